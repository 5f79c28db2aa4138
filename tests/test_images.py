"""One image: pixels against Pillow and numpy in exact arithmetic."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.decoding import convert, decode, natural_mode, needed_mode
from data.resizing import TRANSFORMS, pyramid


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def half_up(values):
    return np.floor(values + 0.5).astype(np.uint8)


def block_means(image, factor):
    """The mean of factor x factor blocks in float64: [H, W, C] -> [H / factor, W / factor, C]."""
    height, width, channels = image.shape
    return image.astype(np.float64).reshape(height // factor, factor, width // factor, factor, channels).mean((1, 3))


# The pyramid


def exact_means(top, factor):
    """The documented means of factor x factor blocks in integers of any size: [H, W, C] -> [H / factor, ...]."""
    height, width, channels = top.shape
    blocks = top.astype(object).reshape(height // factor, factor, width // factor, factor, channels)
    sums, pixels = blocks.sum((1, 3)), factor**2
    means = (2 * sums + pixels) // (2 * pixels)
    if channels == 4:
        weights = np.maximum(sums[..., 3:], 1)
        means[..., :3] = (2 * (blocks[..., :3] * blocks[..., 3:]).sum((1, 3)) + weights) // (2 * weights)
    return means.astype(np.uint8)


def awkward(height, width, channels, kind):
    """Noise, whose alpha is what makes rounding hard."""
    image = noise(height, width, channels)
    if channels == 4 and kind != "noise":
        image[..., 3] = {"faint": 1, "few": np.random.default_rng(1).integers(0, 3, (height, width))}[kind]
    return image


@pytest.mark.parametrize("kind", ["noise", "faint", "few"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mean_is_exact(channels, kind):
    tops = np.stack([awkward(256, 512, channels, kind), awkward(256, 512, channels, "noise")[::-1]])
    for below, level in enumerate(reversed(pyramid(tops, 9))):
        for image, top in zip(level, tops, strict=True):
            np.testing.assert_array_equal(image, exact_means(top, 2**below) if below else top)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("factor", [2, 4, 64])
def test_a_power_of_two_larger_becomes_exact_means(transform, channels, factor):
    image = awkward(128, 256, channels, "few")
    fitted = TRANSFORMS[transform](Image.fromarray(image.squeeze()), (128 // factor, 256 // factor))
    np.testing.assert_array_equal(
        np.asarray(fitted).reshape(fitted.height, fitted.width, channels), exact_means(image, factor)
    )


def test_a_crop_a_power_of_two_larger_becomes_exact_means():
    image = noise(64, 101)
    fitted = TRANSFORMS["center-crop"](Image.fromarray(image), (16, 16))
    np.testing.assert_array_equal(np.asarray(fitted), exact_means(image[:, 18:82], 4))
    image = noise(101, 64)
    fitted = TRANSFORMS["center-crop"](Image.fromarray(image), (16, 16))
    np.testing.assert_array_equal(np.asarray(fitted), exact_means(image[18:82], 4))


def pyramid_of(top, count):
    return [level[0] for level in pyramid(top[None], count)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (16, 16), (64, 32), (256, 256)])
def test_each_level_is_the_rounded_mean_of_the_top(size, channels):
    top = noise(*size, channels)
    levels = pyramid_of(top, min(size).bit_length())
    for below, level in enumerate(reversed(levels)):
        np.testing.assert_array_equal(level, half_up(block_means(top, 2**below)))
        assert level.dtype == np.uint8


def test_halves_are_rounded_up_and_only_once():
    top = np.array([[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]], np.uint8)[..., None]
    small, middle, _ = pyramid_of(top, 3)
    np.testing.assert_array_equal(middle[..., 0], [[1, 0], [1, 0]])
    assert small.item() == 0  # 4/16; the mean of the rounded middle would be 1/2, and round to 1


def test_color_is_weighted_by_alpha():
    top = noise(32, 32, 4)
    top[:8, :8, 3] = 0
    alpha = top[..., 3:].astype(np.float64)
    for below, level in enumerate(reversed(pyramid_of(top, 6))):
        weights, colors = block_means(alpha, 2**below), block_means(top[..., :3] * alpha, 2**below)
        if below:
            np.testing.assert_array_equal(level[..., :3], half_up(colors / np.maximum(weights, 1e-9)))
        np.testing.assert_array_equal(level[..., 3:], half_up(weights))


def test_opaque_images_have_the_pyramid_of_their_colors():
    colors = noise(64, 64)
    opaque = np.concatenate([colors, np.full((64, 64, 1), 255, np.uint8)], axis=2)
    for with_alpha, without in zip(pyramid_of(opaque, 7), pyramid_of(colors, 7), strict=True):
        np.testing.assert_array_equal(with_alpha[..., :3], without)
        assert (with_alpha[..., 3] == 255).all()


@pytest.mark.parametrize("side", [256, 1024])
def test_white_stays_white_down_to_one_pixel(side):
    for channels in (3, 4):
        levels = pyramid_of(np.full((side, side, channels), 255, np.uint8), side.bit_length())
        assert all((level == 255).all() for level in levels)


# Modes


def reopened(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return Image.open(stream)


def test_16_bits_are_scaled_and_rounded():
    values = np.array([[0, 128, 129, 257, 30000, 65535]], np.uint16)
    image = reopened(Image.fromarray(values))
    assert natural_mode(image) == "L"
    np.testing.assert_array_equal(np.asarray(decode(image, "L")), np.rint(values / 257))
    big_endian = Image.open(io.BytesIO(b"P5 6 1 65535\n" + values.astype(">u2").tobytes()))
    np.testing.assert_array_equal(np.asarray(decode(big_endian, "L")), np.rint(values / 257))
    assert decode(Image.fromarray(np.array([[70_000]], np.int32)), "L") == "damaged: 32-bit pixels have no known range"


def test_cmyk_palette_and_single_bits():
    rgb = Image.fromarray(noise(16, 16))
    cmyk = reopened(rgb.convert("CMYK"), "TIFF")
    np.testing.assert_array_equal(np.asarray(decode(cmyk, "RGB")), np.asarray(rgb))
    palette = rgb.quantize(16)
    assert natural_mode(reopened(palette)) == "RGB"
    np.testing.assert_array_equal(np.asarray(decode(reopened(palette), "RGB")), np.asarray(palette.convert("RGB")))
    bits = reopened(rgb.convert("1"))
    assert natural_mode(bits) == "L"
    np.testing.assert_array_equal(np.unique(np.asarray(decode(bits, "L"))), [0, 255])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_is_seen_and_laid_onto_white_if_it_must_go(mode):
    image = Image.new(mode, (4, 4), {"RGBA": (0, 0, 0, 0), "LA": (0, 0), "P": 0, "RGB": (0, 0, 0), "L": 0}[mode])
    keys = {"P": 0, "RGB": (0, 0, 0), "L": 0}
    image = reopened(image, transparency=keys[mode]) if mode in keys else reopened(image)
    assert natural_mode(image) == "RGBA"
    assert (np.asarray(decode(image, "RGBA"))[..., 3] == 0).all()
    assert (np.asarray(convert(image, "RGB")) == 255).all() and (np.asarray(convert(image, "L")) == 255).all()


def png_with_key(values, bits, key):
    """A PNG of [H, W] or [H, W, 3] samples of so many bits in which one value or color is transparent."""
    height, width = values.shape[:2]
    samples = values.reshape(height, -1)
    spread = (samples[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in spread.astype(np.uint8))
    head = struct.pack(">IIBBBBB", width, height, bits, 2 * (values.ndim == 3), 0, 0, 0)
    chunks = [(b"IHDR", head), (b"tRNS", struct.pack(f">{len(key)}H", *key)), (b"IDAT", zlib.compress(rows))]
    content = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, (b"IEND", b"")]
    )
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + content))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_any_depth(bits):
    values = np.arange(16).reshape(2, 8) * 4369 >> 16 - bits  # from 0 to the largest, in 16 bits before the shift
    key = int(values[1, 2])
    clear = values == key
    image = png_with_key(values, bits, [key])
    assert natural_mode(image) == "RGBA"
    decoded = np.asarray(decode(image, "RGBA"))
    np.testing.assert_array_equal(decoded[..., 3], np.where(clear, 0, 255))
    np.testing.assert_array_equal(decoded[..., 0], half_up(values * (255 / (2**bits - 1))))
    for mode in ("RGB", "L"):
        laid = np.asarray(decode(png_with_key(values, bits, [key]), mode)).reshape(2, 8, -1)
        assert (laid[clear] == 255).all()
        np.testing.assert_array_equal(laid[~clear][:, 0], decoded[~clear][:, 0])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_color_of_any_depth(bits):
    values = np.random.default_rng(0).integers(0, 2**bits, (4, 4, 3))
    key = values[1, 2].tolist()
    decoded = np.asarray(decode(png_with_key(values, bits, key), "RGBA"))
    np.testing.assert_array_equal(decoded[..., 3], np.where((values == key).all(-1), 0, 255))


@pytest.mark.parametrize(("mode", "needed"), [("RGBA", "RGB"), ("LA", "L"), ("P", "RGB"), ("L", "L")])
def test_alpha_of_255_throughout_is_none(mode, needed):
    image = Image.new(mode, (4, 4), {"RGBA": (9, 9, 9, 255), "LA": (9, 255), "P": 1, "L": 9}[mode])
    image = reopened(image, transparency=0) if mode in ("P", "L") else reopened(image)
    assert natural_mode(image) == "RGBA" and needed_mode(image) == needed
    array = np.full((4, 4, 4), 255, np.uint8)
    assert needed_mode(array) == "RGB"
    array[3, 3, 3] = 254
    assert needed_mode(array) == "RGBA"


def test_half_transparent_red_on_white():
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert convert(image, "RGB").getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the top left quarter, once shown
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    image = reopened(stored, "JPEG", exif=exif, quality=100)
    assert np.abs(np.asarray(decode(image, "RGB")).astype(int) - upright).max() < 8


def test_odd_tags_beside_the_orientation_do_no_harm():
    """A resolution that is text: what it means does not matter, and the image is turned."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 16)).save(stream, "JPEG")
    photo = stream.getvalue()
    tags = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI4s", 282, 2, 3, b"72\0")
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + tags + bytes(4)
    photo = photo[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + photo[2:]
    assert decode(Image.open(io.BytesIO(photo)), "RGB").size == (16, 32)


# Transforms


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (64, 128)])
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (37, 111), (500, 3)])
def test_transforms_give_the_size_asked_for(transform, size, shape):
    for channels in (1, 3, 4):
        fitted = TRANSFORMS[transform](
            Image.fromarray(noise(*shape, channels).squeeze(-1 if channels == 1 else ())), size
        )
        assert (fitted.height, fitted.width) == size


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_images_of_the_right_size_are_not_touched(transform):
    image = noise(16, 32)
    np.testing.assert_array_equal(np.asarray(TRANSFORMS[transform](Image.fromarray(image), (16, 32))), image)


def test_what_each_transform_keeps():
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, :8], image[:, 8:16], image[:, 16:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    fitted = {name: np.asarray(fit(Image.fromarray(image), (8, 8))) for name, fit in TRANSFORMS.items()}
    assert (fitted["center-crop"] == (0, 255, 0)).all()
    assert fitted["stretch"][4, 0].argmax() == 0 and fitted["stretch"][4, 7].argmax() == 2
    assert (fitted["pad"][0] == 0).all() and fitted["pad"][4, 0].argmax() == 0 and fitted["pad"][4, 7].argmax() == 2
    rgba = Image.fromarray(image).convert("RGBA")
    assert TRANSFORMS["pad"](rgba, (8, 8)).getpixel((0, 0)) == (0, 0, 0, 0)


@pytest.mark.parametrize("side", [16, 24, 128])
def test_hidden_color_does_not_bleed(side):
    image = np.zeros((64, 64, 4), np.uint8)
    image[...] = (0, 255, 0, 0)  # green that nobody sees
    image[16:48, 16:48] = (255, 0, 0, 255)
    fitted = np.asarray(TRANSFORMS["center-crop"](Image.fromarray(image), (side, side)))
    for level in pyramid_of(fitted, 3):
        assert level[..., 1][level[..., 3] > 0].max() <= 1
