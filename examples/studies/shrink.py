"""Make the results that go into git small: pictures of 48 colours, records of a line a row.

    python examples/studies/shrink.py examples/results/exact/particles.png   # or folders

A picture keeps its flat colours, and is scaled down where 40 kB do not hold it. A record
(``*.json``) keeps seven digits of every number, what float32 has, and one line for each row. Of a
comparison's rows it leaves out what row, command and commit make anyway: all options, and the
standardisation. Both are written in place; a file that would not become smaller stays as it is.
Takes a second a file.
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MADE = ("options", "standardisation")
COLOURS, BYTES, SCALES = 48, 40_000, (1.0, 0.75, 0.6, 0.5)


def palette(colours: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Colours (N, 3) to draw with: in turn the one whose pixels are served worst so far."""
    chosen = [int(counts.argmax())]
    distance = np.full(len(colours), np.inf)
    while len(chosen) < min(COLOURS, len(colours)):
        distance = np.minimum(distance, np.square(colours - colours[chosen[-1]]).sum(axis=1))
        chosen.append(int((counts * distance).argmax()))
    return colours[chosen]


def small(picture: Image.Image, scale: float) -> bytes:
    """The picture as a PNG with a palette."""
    size = round(picture.width * scale), round(picture.height * scale)
    pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS)).reshape(-1, 3)
    colours, index, counts = np.unique(
        pixels.astype(float), axis=0, return_inverse=True, return_counts=True
    )
    drawn = palette(colours, counts)
    distances = np.stack([np.square(colours - one).sum(axis=1) for one in drawn])
    nearest = distances.argmin(axis=0).astype(np.uint8)
    image = Image.fromarray(nearest[index.reshape(-1)].reshape(size[::-1]), mode="P")
    image.putpalette(drawn.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def shrunk_picture(path: Path) -> bytes:
    """The largest version that fits, else the smallest one."""
    content = b""
    with Image.open(path) as image:
        if image.mode == "P":
            return path.read_bytes()
        picture = image.convert("RGB")
    for scale in SCALES:
        content = small(picture, scale)
        if len(content) <= BYTES:
            break
    return content


def rounded(value: Any) -> Any:
    """The same content, its numbers with seven digits."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def shrunk_record(path: Path) -> bytes:
    """A line for each row, or each entry of what is no list."""
    content = rounded(json.loads(path.read_text()))
    if isinstance(content, list):
        for row in content:
            for name in MADE if isinstance(row, dict) and "command" in row else ():
                row.pop(name, None)
        return ("[\n" + ",\n".join(map(json.dumps, content)) + "\n]\n").encode()
    return (json.dumps(content) + "\n").encode()


def files(given: list[Path]) -> Iterator[Path]:
    """The pictures and records among these files and inside these folders."""
    for path in given:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in inside if file.suffix in (".png", ".json"))


def main() -> None:
    """Shrink files in place and print what they weigh."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--smoke", action="store_true", help="shrink a picture drawn here")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.paths = [Path("gradient.png")]
        Image.linear_gradient("L").convert("RGB").save(arguments.paths[0])
    for path in files(arguments.paths):
        before = path.stat().st_size
        content = shrunk_picture(path) if path.suffix == ".png" else shrunk_record(path)
        if len(content) < before:
            path.write_bytes(content)
        print(f"{before:>9,} -> {path.stat().st_size:>7,} bytes  {path}")


if __name__ == "__main__":
    main()
