"""gemmi, which reads PDB, mmCIF and STAR files and knows the elements: imported when it is needed."""

from __future__ import annotations

from typing import Any

from bridge.errors import SetupError


def import_gemmi() -> Any:
    """gemmi, or a `SetupError` that says how to get it."""
    try:
        import gemmi
    except ImportError as error:
        raise SetupError(
            'Expected the package gemmi, which cannot be imported. Install it: pip install "simulation-bridge[cryoet]".'
        ) from error
    return gemmi
