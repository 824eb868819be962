"""Files of figures that long studies write line by line, and go on with where they were stopped."""

from pathlib import Path


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file, none where there is no file; a last one that was torn is left out of the file."""
    if not path.is_file():
        return []
    found = path.read_text().splitlines(keepends=True)
    whole = [text for text in found if text.endswith("\n")]
    if whole != found:
        path.write_text("".join(whole))
    return whole
