"""Adapters: external codes as simulators."""

try:
    from bridge.own_packages import check_not_hidden
except ImportError as error:  # another `bridge` is found before ours
    import bridge

    theirs = bridge.__file__ or next(iter(bridge.__path__))
    raise ImportError(
        f"Expected our package 'bridge' beside {__path__[0]}, got {theirs}, which hides it: Python looks "
        "in the folder of the script first, or in the current one. Rename yours, or start from another folder."
    ) from error

check_not_hidden("bridge")
