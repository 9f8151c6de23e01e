"""Draw the pictures that rehearsals train on; runs under the trainer's interpreter.

usage: pictures.py OUT

They are larger than those of the training step. From a picture of 64 x 64 pixels, the middle of
the UNet sees one position, where group normalization works on two numbers. That magnifies the
last bit of a float to 1e-4, and the losses of two correct devices could not be compared. The
alpha channel is for the trainings that use it as a mask.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 128


def main() -> None:
    folder = Path(sys.argv[1]) / "2_shapes"
    folder.mkdir(parents=True)
    for number, (shape, colour) in enumerate(
        (("circle", "red"), ("square", "green"), ("circle", "blue"), ("square", "orange"))
    ):
        picture = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 128))
        draw = ImageDraw.Draw(picture)
        box = (16 + number, 16, 96 + number, 96)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} {shape}\n")


if __name__ == "__main__":
    main()
