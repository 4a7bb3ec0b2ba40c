"""A copy, as the tests of core-admin have their driver make one."""


def _copy_file(source, target):
    with open(target, "wb"):
        pass
