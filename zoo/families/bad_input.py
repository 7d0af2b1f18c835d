"""None yet."""


def cases():
    return []
