"""Words of messages."""


def count(number, noun, plural=None):
    """A number of things: "1 image", "2 images"; plural: of a noun that takes more than an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def size(count):
    """Bytes: "3.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def ends(paths):
    """The shortest ends of different paths that tell them apart: "b", or "a/b" if two end so."""
    parts = [str(path).rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names
