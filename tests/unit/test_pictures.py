"""Pictures of every mode and format become what a viewer shows: 8-bit RGB, upright, on white."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import utils

# utils turns Pillow's warnings off, and pytest on again.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

SIDE = 16
LOSSY = {"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"}
WIDE = ["I", "F", "I;16", "I;16B", "I;16L", "I;16N"]  # more than 8 bits
MODES = ["1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"]
MODES += ["HSV", *WIDE]
TOLERANCES = {"LAB": 24, "YCbCr": 6, "HSV": 6}  # 8 bits of which do not hold all 8-bit RGB colours
# Formats that Pillow writes but does not read by itself, with what writing or reading them needs.
WRITE_ONLY = {
    "PALM": "no reader",
    "PDF": "no reader",
    "EPS": "Ghostscript",
    **dict.fromkeys(["BUFR", "GRIB", "HDF5", "WMF"], "a plugin"),
}
# Modes in which Pillow writes another picture: values above 255 are clipped, the palette's alpha or
# channels are dropped.
LOST_IN_WRITING = {(kind, mode) for kind in ("AVIF", "WEBP", "GIF") for mode in WIDE}
LOST_IN_WRITING |= {("GIF", "LA"), ("PPM", "RGBA")}


def gradient_with_glyph():
    """SIDE×SIDE grey values 0 to 255, rising right and down, with a black L on a white square."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    grey = (rows * SIDE + columns).astype(np.uint8)
    grey[3:12, 4:11] = 255
    grey[4:11, 5] = grey[10, 5:10] = 0
    return grey


def colours():
    """A colour picture: the grey one in red, turned in green, few levels in blue."""
    grey = gradient_with_glyph()
    return np.stack([grey, np.rot90(grey), grey // 64 * 64], axis=-1)


def alpha():
    """Opaque, but for a column that is transparent and one that is half transparent."""
    actual = np.full((SIDE, SIDE), 255, np.uint8)
    actual[:, 0], actual[:, 1] = 0, 128
    return actual


def on_white(rgb, opacity):
    weight = opacity[..., None].astype(float) / 255
    return weight * rgb + (1 - weight) * 255


def grey_as_rgb(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=-1)


def palette_picture():
    """Four colours, by number, and the RGB picture that they make."""
    table = np.array([[0, 0, 0], [255, 255, 255], [200, 30, 60], [10, 120, 240]], np.uint8)
    numbers = gradient_with_glyph() // 64
    picture = Image.fromarray(numbers, "L")
    picture.putpalette(table.tobytes())
    return picture, table[numbers]


def make(mode):
    """(picture in a mode of Pillow's, the 8-bit RGB array that a viewer shows)."""
    grey, rgb, opacity = gradient_with_glyph(), colours(), alpha()
    if mode == "1":
        return Image.fromarray(grey > 127), grey_as_rgb((grey > 127) * 255)
    if mode in ("L", "LA", "La"):
        picture = Image.fromarray(grey)
        if mode == "L":
            return picture, grey_as_rgb(grey)
        picture.putalpha(Image.fromarray(opacity))
        return picture.convert(mode), on_white(grey_as_rgb(grey), opacity)
    if mode == "P":
        return palette_picture()
    if mode == "PA":
        picture, shown = palette_picture()
        picture = picture.convert("PA")
        picture.putalpha(Image.fromarray(opacity))
        return picture, on_white(shown, opacity)
    if mode in ("RGBA", "RGBa"):
        return Image.fromarray(np.dstack([rgb, opacity])).convert(mode), on_white(rgb, opacity)
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) * 257), grey_as_rgb(grey)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255), grey_as_rgb(grey)
    if mode.startswith("I;16"):
        order = ">" if mode == "I;16B" else "<" if mode == "I;16L" else "="
        values = (grey.astype(np.uint16) * 257).astype(f"{order}u2")
        return Image.frombytes(mode, (SIDE, SIDE), values.tobytes()), grey_as_rgb(grey)
    if mode == "RGBX":
        return Image.frombytes("RGBX", (SIDE, SIDE), np.dstack([rgb, opacity]).tobytes()), rgb
    return Image.fromarray(rgb).convert(mode), rgb


def read(path, side=SIDE):
    """What the project makes of a file, as an array H×W×3 of integers."""
    return utils._read_image(path, side).permute(1, 2, 0).numpy().astype(int)


def written(picture, path, **options):
    with warnings.catch_warnings(action="ignore"):
        picture.save(path, **options)
    return path


# Image.registered_extensions loads all plugins.
EXTENSIONS = {
    name: extension for extension, name in reversed(Image.registered_extensions().items())
}
FORMATS = [name for name in sorted(Image.SAVE) if name not in WRITE_ONLY]


def test_untested_formats_are_those_that_pillow_cannot_read():
    Image.init()
    for name in WRITE_ONLY:
        assert name not in Image.OPEN or name in utils.UNREADABLE_FORMATS
    assert set(FORMATS) | set(WRITE_ONLY) >= set(Image.SAVE)


@pytest.mark.parametrize("name", FORMATS)
def test_picture_of_any_mode_is_read_as_it_looks_or_is_an_error(name, tmp_path):
    num_read, num_refused = 0, 0
    for mode in MODES:
        picture, wanted = make(mode)
        path = tmp_path / f"{mode.replace(';', '')}{EXTENSIONS.get(name, '')}"
        if name == "ICNS" and mode not in ("1", "P", "RGBA", "I;16"):
            continue  # slow
        options = {"quality": 100} if name in ("JPEG", "MPO", "AVIF") else {}
        options |= (
            {"lossless": True}
            if name == "WEBP"
            else {"subsampling": 0}
            if name in ("JPEG", "MPO")
            else {}
        )
        options |= {"subsampling": "4:4:4"} if name == "AVIF" else {}
        try:
            written(picture, path, format=name, **options)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SystemError):
            continue  # a mode that the format does not have
        if (name, mode) in LOST_IN_WRITING:
            continue
        try:
            actual = read(path, SIDE)
        except utils.UnreadableImage as error:
            # Only values without a known range are refused, never an 8-bit picture.
            assert mode in ("I", "F") or name == "SPIDER", f"{name} {mode}: {error}"
            assert str(path) in str(error)
            assert "which value is white" in str(error)
            assert "PNG" in str(error)
            num_refused += 1
            continue
        tolerance = max(12 if name in LOSSY else 1, TOLERANCES.get(mode, 1))
        error = np.abs(actual - wanted)
        if name == "GIF" and mode not in (
            "1",
            "L",
            "P",
        ):  # which has a palette, and opacity of 0 or 1
            tolerance, error = 40, error[:, 2:]
        if name == "ICNS":  # which Pillow writes enlarged
            tolerance, error = 14, error.mean()
        assert np.max(error) <= tolerance, f"{name} {mode}: off by {np.max(error)}"
        num_read += 1
    assert num_read or num_refused


def png(path, width, depth, colour_type, rows, *chunks):
    """A PNG file by hand, since Pillow writes no 16-bit color. ``chunks`` are (name, content)."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    encoded = [chunk(name, content) for name, content in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(encoded))
    return path


GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "chunks", "wanted"),
    [
        (1, GREY, b"\x50", [(b"tRNS", b"\0\0")], [255, 255, 255, 255]),
        (1, GREY, b"\x50", [(b"tRNS", b"\0\1")], [0, 255, 0, 255]),
        (2, GREY, b"\x1b", [], [0, 85, 170, 255]),
        (2, GREY, b"\x1b", [(b"tRNS", b"\0\1")], [0, 255, 170, 255]),
        (2, GREY, b"\x1b", [(b"tRNS", b"\0\3")], [0, 85, 170, 255]),
        (4, GREY, b"\x12\x3f", [(b"tRNS", b"\0\2")], [17, 255, 51, 255]),
        (8, GREY, b"\1\2\3\4", [(b"tRNS", b"\0\3")], [1, 2, 255, 4]),
        (16, GREY, b"\0\0\1\1\x80\x80\xff\xff", [], [0, 1, 128, 255]),
        (16, GREY, b"\0\0\1\1\x80\x80\xff\xff", [(b"tRNS", b"\1\1")], [0, 255, 128, 255]),
        (16, GREY_ALPHA, b"\5\5\xff\xff" + b"\5\5\0\0" * 3, [], [5, 255, 255, 255]),
        (16, RGB, b"\x07\x07" * 6 + b"\x09\x09" * 6, [], [7, 7, 9, 9]),
        (16, RGB, b"\x07\x07" * 6 + b"\x09\x09" * 6, [(b"tRNS", b"\7\7" * 3)], [255, 255, 9, 9]),
        (16, RGB_ALPHA, b"\3\3\3\3\3\3\xff\xff" * 2 + b"\0" * 16, [], [3, 3, 255, 255]),
        (
            2,
            PALETTE,
            b"\x1b",
            [(b"PLTE", bytes([9, 9, 9, 20, 20, 20, 30, 30, 30, 40, 40, 40]))],
            [9, 20, 30, 40],
        ),
        (2, PALETTE, b"\x1b", [(b"PLTE", bytes([9] * 12)), (b"tRNS", b"\0")], [255, 9, 9, 9]),
        (
            2,
            PALETTE,
            b"\x1b",
            [(b"PLTE", bytes([0] * 12)), (b"tRNS", b"\x80\xff\0\xff")],
            [127, 0, 255, 0],
        ),
    ],
)
def test_png_of_any_depth_and_transparency_is_read_as_it_looks(
    depth, colour_type, row, chunks, wanted, tmp_path
):
    rows = [row] * 4
    path = png(tmp_path / "picture.png", 4, depth, colour_type, rows, *chunks)
    assert np.array_equal(read(path, 4), np.broadcast_to(np.array(wanted)[:, None], (4, 4, 3)))


def tiff(path, values, byte_order="<", bits=None, **tags):
    """A TIFF file of one channel by hand, uncompressed, from an array; tags by number."""
    data = values.astype(values.dtype.newbyteorder(byte_order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    entries = {256: width, 257: height, 258: bits or values.dtype.itemsize * 8, 259: 1, 262: 1}
    entries |= {273: 8, 277: 1, 278: height, 279: len(data), 339: kind}
    entries |= {int(number[1:]): value for number, value in tags.items()}
    table = b"".join(
        struct.pack(f"{byte_order}HHI", number, 4 if number in (256, 257, 273, 278, 279) else 3, 1)
        + (struct.pack(f"{byte_order}I", value) if number in (256, 257, 273, 278, 279)
           else struct.pack(f"{byte_order}HH", value, 0))
        for number, value in sorted(entries.items())
    )  # fmt: skip
    header = (b"II*\0" if byte_order == "<" else b"MM\0*") + struct.pack(
        f"{byte_order}I", 8 + len(data)
    )
    path.write_bytes(
        header + data + struct.pack(f"{byte_order}H", len(entries)) + table + b"\0\0\0\0"
    )
    return path


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_16_bit_tiff_of_both_byte_orders_is_scaled(byte_order, tmp_path):
    grey = gradient_with_glyph()
    path = tiff(tmp_path / "picture.tif", grey.astype(np.uint16) * 257, byte_order)
    assert np.array_equal(read(path), grey_as_rgb(grey))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_whose_zero_is_white_is_inverted(dtype, tmp_path):
    grey = gradient_with_glyph()
    path = tiff(
        tmp_path / "picture.tif", grey.astype(dtype) * (257 if dtype == np.uint16 else 1), t262=0
    )
    assert np.array_equal(read(path), grey_as_rgb(255 - grey))


def test_12_bit_tiff_is_scaled_by_its_white_level(tmp_path):
    """Two values in three bytes: 0x000 and 0xfff, 0x800 and 0x100."""
    rows = np.frombuffer(b"\x00\x0f\xff\x80\x01\x00" * 4, np.uint8).reshape(4, 6)
    path = tiff(tmp_path / "picture.tif", rows, bits=12, t256=4)
    assert np.array_equal(read(path, 4), grey_as_rgb([[0, 255, 128, 16]] * 4))


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.int32, np.float32])
def test_tiff_without_a_known_white_is_refused_with_a_remedy(dtype, tmp_path):
    path = tiff(tmp_path / "picture.tif", gradient_with_glyph().astype(dtype))
    with pytest.raises(
        utils.UnreadableImage, match=r"picture\.tif.*mode [IF].*8-bit or 16-bit PNG"
    ):
        read(path)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_16_bit_tiff_is_scaled(compression, tmp_path):
    picture, wanted = make("I;16")
    assert np.array_equal(
        read(written(picture, tmp_path / "picture.tif", compression=compression)), wanted
    )


@pytest.mark.parametrize("white", [1, 3, 100, 255, 1000, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_pgm_of_any_maximum_is_scaled_by_it(white, plain, tmp_path):
    values = np.linspace(0, white, SIDE * SIDE).round().astype(int).reshape(SIDE, SIDE)
    body = (
        " ".join(map(str, values.flatten())).encode()
        if plain
        else values.astype(">u2" if white > 255 else "u1").tobytes()
    )
    path = tmp_path / "picture.pgm"
    path.write_bytes(f"P{2 if plain else 5} {SIDE} {SIDE} {white}\n".encode() + body)
    assert np.abs(read(path) - grey_as_rgb(values * 255 / white)).max() <= 0.51


def test_float_pfm_is_an_error(tmp_path):
    path = written(make("F")[0], tmp_path / "picture.pfm", format="PPM")
    with pytest.raises(utils.UnreadableImage, match="mode F of PPM"):
        read(path)


def test_16_bit_values_are_divided_by_257_and_rounded(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = written(Image.fromarray(values), tmp_path / "picture.png")
    assert np.array_equal(read(path, 256)[..., 0], (values / 257 + 0.5).astype(int))


def test_16_bit_pictures_of_two_classes_stay_apart(tmp_path):
    """Clipped at 255, both pictures would be white."""
    actual = []
    for number, value in enumerate((20_000, 40_000)):
        picture = Image.fromarray(np.full((4, 4), value, np.uint16))
        actual.append(read(written(picture, tmp_path / f"{number}.png"), 4))
    assert actual[0].max() == 78 and actual[1].min() == 156


def test_cmyk_jpeg_of_adobe_is_not_inverted(tmp_path):
    picture, wanted = make("CMYK")
    path = written(picture, tmp_path / "picture.jpg", quality=100)
    assert b"Adobe" in path.read_bytes() and np.abs(read(path) - wanted).max() < 12


@pytest.mark.parametrize("opacity", [0, 255])
def test_32_bit_bmp_whose_fourth_channel_is_constant_is_opaque(opacity, tmp_path):
    picture = Image.fromarray(np.dstack([colours(), np.full((SIDE, SIDE), opacity, np.uint8)]))
    for name in ("picture.bmp", "picture.tga"):
        assert np.array_equal(read(written(picture, tmp_path / name)), colours())


@pytest.mark.parametrize(
    "name", ["picture.gif", "picture.webp", "picture.png", "picture.tif", "picture.avif"]
)
def test_first_frame_of_an_animation_is_read(name, tmp_path):
    first = make("P")[0]
    others = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    options = (
        {"lossless": True}
        if name.endswith("webp")
        else {"quality": 100, "subsampling": "4:4:4"}
        if name.endswith("avif")
        else {}
    )
    path = written(
        first.convert("RGB"), tmp_path / name, save_all=True, append_images=others, **options
    )
    assert np.abs(read(path) - make("P")[1]).max() <= (8 if name.endswith("avif") else 1)


def rectangle():
    """A colour picture twice as wide as high, without symmetry."""
    return np.concatenate([colours()[:8], 255 - colours()[:8]], axis=1)


@pytest.mark.parametrize(
    "name", ["picture.jpg", "picture.png", "picture.webp", "picture.tif", "picture.avif"]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_pictures_are_read_upright(orientation, name, tmp_path):
    upright = Image.fromarray(rectangle()).resize((32, 8), Image.Resampling.NEAREST)
    # The picture as stored by a camera: ImageOps.exif_transpose turns it upright.
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    exif = Image.Exif()
    exif[0x0112] = inverse
    upright.info["exif"] = exif.tobytes()
    stored = ImageOps.exif_transpose(upright)
    stored.info.pop("exif", None)
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if name.endswith("jpg") else {"lossless": True}
    options = {"quality": 100, "subsampling": "4:4:4"} if name.endswith("avif") else options
    options = {} if name.endswith(("png", "tif")) else options
    path = written(stored, tmp_path / name, exif=exif, **options)
    assert utils._upright_size(path) == (32, 8)
    with utils._opened(path) as image:
        actual = np.asarray(utils._as_viewed(image)).astype(int)
    assert np.abs(actual - np.asarray(upright)).max() <= (
        12 if name.endswith(("jpg", "avif")) else 0
    )


@pytest.mark.parametrize(
    "block",
    [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0" + bytes(40), b"junk"],
)
def test_picture_with_damaged_exif_is_read_unrotated(block, tmp_path):
    path = written(Image.fromarray(colours()), tmp_path / "picture.png", exif=block)
    assert np.array_equal(read(path), colours()) and utils._upright_size(path) == (SIDE, SIDE)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_picture_of_unknown_orientation_is_read_unrotated(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = written(Image.fromarray(rectangle()), tmp_path / "picture.png", exif=exif)
    with utils._opened(path) as image:
        assert np.array_equal(np.asarray(utils._as_viewed(image)), rectangle())
    assert utils._upright_size(path) == (32, 8)


def test_long_narrow_picture_needs_little_memory_and_keeps_its_centre(tmp_path):
    values = np.zeros((1, 60_001), np.uint8)
    values[0, 30_000] = 255
    path = written(Image.fromarray(values), tmp_path / "picture.png")
    actual = read(path, 64)
    assert actual.shape == (64, 64, 3) and actual[32, 32, 0] > 200
    assert read(written(Image.fromarray(values.T), tmp_path / "high.png"), 64)[32, 32, 0] > 200


@pytest.mark.parametrize("ratio", [7, 8, 9, 30])
def test_cropping_a_long_picture_before_resizing_changes_nothing(ratio, tmp_path):
    pixels = np.random.default_rng(ratio).integers(0, 256, (8, 8 * ratio, 3)).astype(np.uint8)
    path = written(Image.fromarray(pixels), tmp_path / "picture.png")
    whole = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    whole = utils.transforms.resize(whole, [16], antialias=True)
    assert np.array_equal(
        read(path, 16), utils.transforms.center_crop(whole, [16]).permute(1, 2, 0).numpy()
    )


def unreadable(path):
    with pytest.raises(utils.UnreadableImage) as caught:
        utils._read_image(path, 8)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    return str(caught.value)


def test_files_that_are_not_pictures_are_named_with_the_reason(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"")
    assert "empty" in unreadable(path)
    path.write_text("<html>")
    assert "no format" in unreadable(path)
    written(Image.fromarray(colours()), path)
    path.write_bytes(path.read_bytes()[:100])
    assert "truncated" in unreadable(path)
    path.unlink()
    assert "No such file" in unreadable(path)
    path.symlink_to("nowhere.png")
    assert "a link to a file that does not exist" in unreadable(path)
    path.unlink()
    path.mkdir()
    assert "not a regular file" in unreadable(path)


@pytest.mark.parametrize(
    "name", ["picture.png", "picture.gif", "picture.bmp", "picture.tif", "picture.webp"]
)
def test_truncated_picture_is_an_error_unless_all_pixels_are_present(name, tmp_path):
    options = {"lossless": True} if name.endswith("webp") else {}
    path = written(make("P")[0], tmp_path / name, **options)
    content, num_refused = path.read_bytes(), 0
    for length in range(1, len(content), 9):
        path.write_bytes(content[:length])
        try:
            assert np.array_equal(read(path), make("P")[1])
        except utils.UnreadableImage:
            num_refused += 1
    assert num_refused > 0.7 * len(content) / 9


def test_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "picture.png")
    assert "not a regular file" in unreadable(tmp_path / "picture.png")


def test_file_without_permission_is_named_with_the_reason(tmp_path, monkeypatch):
    path = written(Image.fromarray(colours()), tmp_path / "picture.png")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    assert "(Permission denied)" in unreadable(path)


def test_too_many_open_files_are_not_an_unreadable_image(tmp_path, monkeypatch):
    """Otherwise --skip_corrupt would skip readable images."""
    path = written(Image.fromarray(colours()), tmp_path / "picture.png")

    def refuse(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(utils.UserError, match="Too many open files") as caught:
        utils._read_image(path, 8)
    assert not isinstance(caught.value, utils.UnreadableImage)


def test_picture_too_large_for_pillow_is_refused_in_one_line(tmp_path, monkeypatch):
    path = written(Image.fromarray(colours()), tmp_path / "picture.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "exceeds limit" in unreadable(path)


def test_picture_with_pillow_warnings_prints_none(tmp_path, monkeypatch):
    path = written(Image.fromarray(colours()), tmp_path / "picture.png")
    # Pillow warns above this limit and refuses twice as many pixels.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE - 1)
    utils._pillow.cache_clear()  # pytest restores the filters before each test
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(path)
        assert not caught
        warnings.warn("of another package", stacklevel=1)
    assert len(caught) == 1
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(path).close()
