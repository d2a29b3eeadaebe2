"""Words of messages."""


def count(number, noun, plural=None):
    """A number of things: "1 image", "2 images"; plural: of a noun that takes more than an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
