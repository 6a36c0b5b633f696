"""The methods of `bridge.fit`, one file each, and the choice between them; in the order in which they are listed."""

# ruff: noqa: F401, I001
import bridge.fitting.methods.auto
import bridge.fitting.methods.kriging
import bridge.fitting.methods.trust_region
import bridge.fitting.methods.gauss_newton
import bridge.fitting.methods.first_order
import bridge.fitting.methods.natural
