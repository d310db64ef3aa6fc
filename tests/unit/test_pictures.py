"""Pictures become 8-bit RGB, upright and on white; what has another depth is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

import utils

SIDE = 16


def gradient_with_glyph():
    """SIDE×SIDE grey values 0 to 255, rising right and down, with a black L on a white square."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    grey = (rows * SIDE + columns).astype(np.uint8)
    grey[3:12, 4:11] = 255
    grey[4:11, 5] = grey[10, 5:10] = 0
    return grey


GREY = gradient_with_glyph()
COLOURS = np.stack([GREY, np.rot90(GREY), GREY // 64 * 64], axis=-1)
OPACITY = np.full((SIDE, SIDE), 255, np.uint8)
OPACITY[:, 0], OPACITY[:, 1] = 0, 128
TABLE = np.array([[0, 0, 0], [255, 255, 255], [200, 30, 60], [10, 120, 240]], np.uint8)


def grey_as_rgb(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=-1)


def on_white(rgb):
    weight = OPACITY[..., None].astype(float) / 255
    return weight * rgb + (1 - weight) * 255


def palette_picture():
    picture = Image.fromarray(GREY // 64, "L")
    picture.putpalette(TABLE.tobytes())
    return picture


def decoded(content):
    """What the project makes of a file's bytes, as an array H×W×3 of integers."""
    return np.asarray(utils.decode_image(io.BytesIO(content))).astype(int)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def with_opacity(array, mode):
    return Image.fromarray(np.dstack([array, OPACITY]), mode)


PICTURES = {
    "1": (Image.fromarray(GREY > 127), grey_as_rgb((GREY > 127) * 255)),
    "L": (Image.fromarray(GREY), grey_as_rgb(GREY)),
    "LA": (with_opacity(GREY, "LA"), on_white(grey_as_rgb(GREY))),
    "P": (palette_picture(), TABLE[GREY // 64]),
    "RGB": (Image.fromarray(COLOURS), COLOURS),
    "RGBA": (with_opacity(COLOURS, "RGBA"), on_white(COLOURS)),
    "CMYK": (Image.fromarray(COLOURS).convert("CMYK"), COLOURS),
}
KINDS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"],
    "BMP": ["1", "L", "P", "RGB"],
    "GIF": ["1", "L", "P"],
    "WEBP": ["L", "RGB", "RGBA"],
    "PPM": ["1", "L", "RGB"],
    "TGA": ["1", "L", "P", "RGB", "RGBA"],
    "JPEG": ["L", "RGB", "CMYK"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in KINDS for mode in KINDS[kind]])
def test_8_bit_picture_of_any_mode_and_format_is_read_as_it_looks(kind, mode):
    picture, wanted = PICTURES[mode]
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    actual = decoded(encoded(picture, kind, **options.get(kind, {})))
    assert np.abs(actual - wanted).max() <= (12 if kind == "JPEG" else 1)


# ---------------------------------------------------------------- PNG by hand


def png(depth, colour_type, row, *chunks):
    """A PNG file of 4×4 pixels with equal rows; Pillow writes no 16-bit colour."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", 4, 4, depth, colour_type, 0, 0, 0)
    body = zlib.compress((b"\0" + row) * 4)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


G, RGB, PALETTE, GA, RGBA = 0, 2, 3, 4, 6
SEVENS_AND_NINES = b"\x07\xff" * 6 + b"\x09\x01" * 6
FOUR_COLOURS = (b"PLTE", bytes([9] * 3 + [20] * 3 + [30] * 3 + [40] * 3))


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "chunks", "wanted"),
    [
        (1, G, b"\x50", [(b"tRNS", b"\0\0")], [255, 255, 255, 255]),
        (4, G, b"\x12\x3f", [], [17, 34, 51, 255]),
        (8, G, b"\1\2\3\4", [(b"tRNS", b"\0\3")], [1, 2, 255, 4]),
        (16, G, b"\0\0\1\1\x80\x80\xff\xff", [], [0, 1, 128, 255]),
        (16, GA, b"\5\5\xff\xff" + b"\5\5\0\0" * 3, [], [5, 255, 255, 255]),
        (16, RGB, SEVENS_AND_NINES, [], [7, 7, 9, 9]),
        (16, RGBA, b"\3\3\3\3\3\3\xff\xff" * 2 + b"\0" * 16, [], [3, 3, 255, 255]),
        (2, PALETTE, b"\x1b", [FOUR_COLOURS, (b"tRNS", b"\xff\0")], [9, 255, 30, 40]),
    ],
)
def test_png_of_any_depth_is_read_as_it_looks(depth, colour_type, row, chunks, wanted):
    actual = decoded(png(depth, colour_type, row, *chunks))
    assert np.array_equal(actual, np.broadcast_to(np.array(wanted)[:, None], (4, 4, 3)))


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "colour"),
    [(4, G, b"\x12\x3f", b"\0\2"), (16, RGB, SEVENS_AND_NINES, b"\7\xff" * 3)],
)
def test_transparent_colour_of_other_than_8_bits_is_refused(depth, colour_type, row, colour):
    """Pillow compares it with pixels that are scaled to 8 bits, and makes others transparent."""
    with pytest.raises(ValueError):
        decoded(png(depth, colour_type, row, (b"tRNS", colour)))


def test_16_bit_greyscale_png_is_divided_by_257_and_rounded():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    actual = decoded(encoded(Image.fromarray(values)))
    assert np.array_equal(actual, grey_as_rgb((values / 257 + 0.5).astype(int)))


# ---------------------------------------------------------------- TIFF by hand


def tiff(planes, byte_order="<", **tags):
    """An uncompressed TIFF file of an array C×H×W, with separate planes; tags by number."""
    channels, height, width = planes.shape
    data = planes.astype(planes.dtype.newbyteorder(byte_order)).tobytes()
    bits, kind = planes.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[planes.dtype.kind]
    size = len(data) // channels
    strips = [8 + size * channel for channel in range(channels)]
    entries = {256: [width], 257: [height], 258: [bits] * channels, 259: [1]}
    entries |= {262: [2 if channels > 1 else 1], 273: strips, 277: [channels], 278: [height]}
    entries |= {279: [size] * channels, 284: [2 if channels > 1 else 1], 339: [kind] * channels}
    entries |= {int(number[1:]): value for number, value in tags.items()}
    table, extra, start = b"", b"", 8 + len(data) + 6 + 12 * len(entries)
    for number, values in sorted(entries.items()):
        content = struct.pack(f"{byte_order}{len(values)}I", *values)
        if len(content) > 4:
            content, extra = struct.pack(f"{byte_order}I", start + len(extra)), extra + content
        table += struct.pack(f"{byte_order}HHI", number, 4, len(values)) + content
    header = b"II*\0" if byte_order == "<" else b"MM\0*"
    header += struct.pack(f"{byte_order}I", 8 + len(data))
    count = struct.pack(f"{byte_order}H", len(entries))
    return header + data + count + table + b"\0\0\0\0" + extra


PLANES = np.ascontiguousarray(COLOURS.transpose(2, 0, 1))


def test_8_bit_tiff_is_read_as_it_looks():
    assert np.array_equal(decoded(tiff(GREY[None])), grey_as_rgb(GREY))
    assert np.array_equal(decoded(tiff(PLANES)), COLOURS)
    assert np.array_equal(decoded(tiff(GREY[None], t262=[0])), grey_as_rgb(255 - GREY))


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32])
@pytest.mark.parametrize("planes", [GREY[None], PLANES], ids=["grey", "planar RGB"])
def test_tiff_without_unsigned_8_bits_is_refused(planes, dtype, byte_order):
    with pytest.raises((ValueError, OSError)):
        decoded(tiff(planes.astype(dtype), byte_order))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_wide_modes_of_other_formats_are_refused(mode):
    """PGM of 16 bits and PFM, of which Pillow scales the first only."""
    with pytest.raises(ValueError):
        decoded(encoded(Image.fromarray(GREY).convert(mode), "PPM"))


# ---------------------------------------------------------------- orientation


WIDE = np.concatenate([COLOURS[:8], 255 - COLOURS[:8]], axis=1)


@pytest.mark.parametrize(
    ("kind", "upright"), [("TIFF", WIDE), ("PNG", WIDE[..., 0].astype(np.uint16) * 257)]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_picture_is_read_upright(orientation, kind, upright):
    picture = Image.fromarray(upright)
    # As a camera stores it: exif_transpose undoes the inverse of the orientation.
    exif = picture.getexif()
    exif[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)
    stored = Image.fromarray(np.asarray(ImageOps.exif_transpose(picture)))
    exif[0x0112] = orientation
    content = encoded(stored, kind, exif=exif)
    wanted = upright if upright.ndim == 3 else grey_as_rgb(upright // 257)
    assert np.array_equal(decoded(content), wanted)


# ---------------------------------------------------------------- broken files


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_truncated_picture_is_an_error_unless_all_pixels_are_present(kind):
    content = encoded(palette_picture().convert("RGB"), kind)
    whole, num_refused = decoded(content), 0
    for length in range(1, len(content), 9):
        try:
            assert np.array_equal(decoded(content[:length]), whole)
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, TypeError):
            num_refused += 1
    assert num_refused > 0.7 * len(content) / 9
