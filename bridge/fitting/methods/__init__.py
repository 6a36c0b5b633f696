"""The methods of `bridge.fit`, one file each, and the choice between them."""
