"""A contract that cannot fail says nothing: which tests of it a broken member fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def failing(contract: type, folder: Path, **attributes: object) -> set[str]:
    """Names of the tests of a suite, less `test_`, that fail with these attributes, such as made=Broken()."""
    suite = type("TestBroken", (contract,), attributes)()
    failed = set()
    for name in (name for name in dir(suite) if name.startswith("test_")):
        place = folder / name
        place.mkdir(parents=True)
        test = getattr(suite, name)
        try:
            with np.errstate(all="ignore"):
                test(place) if "tmp_path" in test.__code__.co_varnames[: test.__code__.co_argcount] else test()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # also those that are no Exception, so that nothing catches them on the way
            failed.add(name.removeprefix("test_"))
    return failed
