"""Tar archives and webdataset shards as sources: content, labels, hostile members."""

import gzip
import io
import json
import os
import tarfile

import pytest
from source_files import as_read, check, encoded, pixels

from data.errors import DataError
from data.sources import open_source, tars

IMAGES = pixels(6)
FILES = [(f"{'ba'[i % 2]}/{i}.png", encoded(IMAGES[i])) for i in range(6)]


def make_tar(path, files, mode="w", **fields):
    """A tar of (name, bytes or TarInfo) in the given order."""
    with tarfile.open(path, mode, **fields) as archive:
        for name, content in files:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return name, member


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.bz2", "x.tar.xz", "no_suffix"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_a_folder_in_the_order_of_the_archive(tmp_path, name, format):
    mode = f"w:{name.rpartition('.')[2]}" if name.count(".") == 2 else "w"
    long = f"./a/{'long' * 40}.png"
    noise = [("./a/.hidden.png", b"x"), ("notes.txt", b"y"), special("a", tarfile.DIRTYPE)]
    shown = "y" * 10 if format == tarfile.USTAR_FORMAT else "ü" * 80
    files = [
        *FILES,
        (long if format != tarfile.USTAR_FORMAT else "a/l.png", FILES[0][1]),
        (f"a/{shown}.png", FILES[1][1]),
    ]
    source = open_source(make_tar(tmp_path / name, [*noise, *files], mode, format=format))
    assert (source.name, source.classes, source.ignored) == (name, ("a", "b"), {".txt": 1})
    names = [name.removeprefix("./") for name, _ in files]
    check(source, [*IMAGES, IMAGES[0], IMAGES[1]], [1, 0, 1, 0, 1, 0, 0, 0], names)
    assert open_source(str(tmp_path / name), 3).count == 3
    assert sorted(os.listdir(tmp_path)) == [name]


def test_a_tar_with_dataset_json(tmp_path):
    labels = {"labels": [[name, [i, 0.5]] for i, (name, _) in enumerate(FILES)]}
    files = [*FILES, ("./dataset.json", json.dumps(labels).encode())]
    source = open_source(make_tar(tmp_path / "x.tar", files))
    assert source.classes is None and source.label_dim == 2 and source.ignored == {}
    check(source, IMAGES, [[float(i), 0.5] for i in range(6)])


def webdataset(path, indices, suffix, label, mode="w"):
    files = []
    for i in indices:
        files += [(f"s/{i:03d}.png", encoded(IMAGES[i])), (f"s/{i:03d}.txt", b"a caption")]
        files += [(f"s/{i:03d}.{suffix}", label(i))]
    return make_tar(path, files, mode)


@pytest.mark.parametrize(
    ("suffix", "label", "expected"),
    [
        ("cls", lambda i: b"%d" % (i % 3), [i % 3 for i in range(6)]),
        ("cls", lambda i: b"%d\n" % (i % 3), [i % 3 for i in range(6)]),
        ("json", lambda i: json.dumps({"label": i % 3, "key": 7}).encode(), [i % 3 for i in range(6)]),
        ("json", lambda i: json.dumps({"label": [i, -0.5]}).encode(), [[i, -0.5] for i in range(6)]),
        ("json", lambda i: json.dumps({"caption": "x"}).encode(), [None] * 6),
        ("json", lambda i: b"{broken", [None] * 6),
        ("json", lambda i: b"[" * 100_000, [None] * 6),
    ],
)
def test_webdataset_labels_lie_beside_the_images(tmp_path, suffix, label, expected):
    folder = tmp_path / "shards"
    folder.mkdir()
    webdataset(folder / "s-001.tar", range(2, 4), suffix, label)
    webdataset(folder / "s-000.tar", range(2), suffix, label)
    webdataset(folder / "s-002.tar.gz", range(4, 6), suffix, label, "w:gz")
    (folder / "README").write_text("not a shard")
    source = open_source(str(folder))
    assert source.name == "shards" and source.ignored == {".txt": 6}
    assert source.classes == (("0", "1", "2") if expected[0] == 0 else None)
    assert source.label_dim == (2 if isinstance(expected[0], list) else None)
    check(source, IMAGES, expected, [f"s/{i:03d}.png" for i in range(6)])


def test_a_pattern_stands_for_shards(tmp_path):
    for shard in range(3):
        webdataset(tmp_path / f"s-{shard + 8:02d}.tar", [2 * shard, 2 * shard + 1], "cls", lambda i: b"%d" % i)
    check(open_source(str(tmp_path / "s-{08..10}.tar")), IMAGES, range(6))
    check(open_source(str(tmp_path / "s-{1..1}{0..0}.tar")), IMAGES[4:], [4, 5])
    with pytest.raises(DataError, match=r"4 files, of which .*s-11.tar does not exist"):
        open_source(str(tmp_path / "s-{08..11}.tar"))
    with pytest.raises(DataError, match="more than 100000 files"):
        open_source(str(tmp_path / "s-{0..999}{0..999}.tar"))


def test_a_tar_beside_what_was_in_it_is_not_read_again(tmp_path):
    make_tar(tmp_path / "x.tar", FILES)
    for name, content in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source = open_source(str(tmp_path))
    assert source.count == 6 and source.ignored == {".tar": 1} and source.classes == ("a", "b")


def test_the_same_key_in_two_shards_are_two_samples(tmp_path):
    for shard in range(2):
        files = [("0.png", encoded(IMAGES[shard])), ("0.cls", b"%d" % shard)]
        make_tar(tmp_path / f"{shard}.tar", files)
    check(open_source(str(tmp_path)), IMAGES[:2], [0, 1])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("0.png", b""), ("0.cls", b"1"), ("1.png", b"")], "label of 1.png is missing, that of 0.png an integer"),
        ([("0.png", b""), ("0.cls", b"cat")], "label of 0.png is 'cat'"),
        ([("0.png", b""), ("0.cls", b"-1")], "label of 0.png is -1"),
        ([("0.png", b""), ("0.cls", b"1"), ("0.mask.png", b"")], "2 images called 0"),
        ([("0.png", b""), ("0.json", b'{"label": [1, NaN]}')], "label of 0.png is not finite"),
        ([("0.png", b""), ("0.json", b'{"label": true}')], "label of 0.png is True"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        open_source(make_tar(tmp_path / "x.tar", files))


def test_a_cls_is_preferred_to_a_json(tmp_path):
    image = ("0.png", encoded(IMAGES[0]))
    for order in (1, -1):
        files = [("0.json", b'{"label": 1}'), ("0.cls", b"2")][::order]
        source = open_source(make_tar(tmp_path / "x.tar", [image, *files]))
        assert [item.label for item in source.read()] == [2]


def test_a_compressed_archive_is_not_unpacked_again_for_every_part(tmp_path, monkeypatch):
    source = open_source(make_tar(tmp_path / "x.tar.gz", FILES, "w:gz"))
    opened = []
    real = tars.open_unpacked
    monkeypatch.setattr(tars, "open_unpacked", lambda path: opened.append(path) or real(path))
    parts = [as_read(source.read(start, start + 1))[0][1] for start in (0, 1, 3, 5, 2)]
    assert parts == [IMAGES[index].tobytes() for index in (0, 1, 3, 5, 2)] and len(opened) == 1


def test_an_archive_that_breaks_while_it_is_read(tmp_path):
    """A reading that met damage leaves nothing behind that the next one would stumble over."""
    path = make_tar(tmp_path / "x.tar.gz", FILES, "w:gz")
    source, whole = open_source(path), (tmp_path / "x.tar.gz").read_bytes()
    os.truncate(path, len(whole) // 2)
    images = [item.image for item in source.read()]
    assert len(images) == 6 and isinstance(images[-1], str) and images[-1].startswith("cannot be opened")
    (tmp_path / "x.tar.gz").write_bytes(whole)
    check(source, IMAGES, [1, 0, 1, 0, 1, 0])


# Hostile archives


def test_links_devices_and_unsafe_names_are_listed_and_nothing_is_written(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(FILES[0][1])
    inside = tmp_path / "in"
    inside.mkdir()
    hostile = [
        special("sym.png", tarfile.SYMTYPE, str(outside)),
        special("hard.png", tarfile.LNKTYPE, "../outside.png"),
        special("char.png", tarfile.CHRTYPE),
        special("block.png", tarfile.BLKTYPE),
        special("pipe.png", tarfile.FIFOTYPE),
        ("/absolute.png", b"x"),
        ("../up.png", b"x"),
        ("a/../../up.png", b"x"),
        ("C:\\x.png", b"x"),
        special("label.cls", tarfile.SYMTYPE, str(outside)),
    ]
    source = open_source(make_tar(inside / "x.tar", [*hostile, FILES[0]]))
    read = {item.name: item.image for item in source.read()}
    assert not isinstance(read.pop("b/0.png"), str)
    assert {read.pop(name) for name in ("sym.png", "hard.png")} == {"link in the archive"}
    assert {read.pop(f"{name}.png") for name in ("char", "block", "pipe")} == {"not a regular file"}
    assert len(read) == 4 and set(read.values()) == {"unsafe name in the archive"}
    assert source.ignored == {".cls": 1} and os.listdir(inside) == ["x.tar"]
    make_tar(inside / "y.tar", [FILES[0], special("dataset.json", tarfile.SYMTYPE, str(outside))])
    with pytest.raises(DataError, match=r"dataset.json in y.tar cannot be read: link in the archive"):
        open_source(str(inside / "y.tar"))


def test_members_that_claim_to_be_huge(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_MEMBER", 1 << 16)
    files = [("huge.png", bytes(1 << 17)), FILES[0]]
    for path, mode in (("x.tar", "w"), ("x.tar.gz", "w:gz")):
        huge, good = open_source(make_tar(tmp_path / path, files, mode)).read()
        assert "unpacks to more than" in huge.image and not isinstance(good.image, str)
    # A header of the format itself, which tarfile would read whole.
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        member = special("x", kind)[1]
        member.size = 1 << 40
        with gzip.open(tmp_path / "bomb.tar.gz", "wb") as file:
            file.write(member.tobuf(tarfile.GNU_FORMAT))
        with pytest.raises(DataError, match="claims to have 1099511627776 bytes"):
            open_source(str(tmp_path / "bomb.tar.gz"))


def test_a_negative_size_does_not_loop(tmp_path):
    make_tar(tmp_path / "x.tar", FILES[:2])
    member = tarfile.TarInfo("a.png")
    member.size = -1024  # what follows is the member before
    content = (tmp_path / "x.tar").read_bytes()[: 512 * 4] + member.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match="negative size"):
        open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_that_was_cut_anywhere_is_refused(tmp_path, compressed):
    path = tmp_path / ("x.tar.gz" if compressed else "x.tar")
    make_tar(path, FILES, "w:gz" if compressed else "w")
    whole = path.read_bytes()
    end = len(whole) - 9 if compressed else 512 * 12  # six images of less than a block and their headers
    for length in range(1, end, 97 if not compressed else 31):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged"):
            open_source(str(path))
    if not compressed:  # exactly between two members, where tarfile sees nothing wrong
        path.write_bytes(whole[: 512 * 4])
        with pytest.raises(DataError, match="no end mark"):
            open_source(str(path))


def test_a_flipped_bit_in_a_compressed_archive_is_seen(tmp_path):
    path = tmp_path / "x.tar.gz"
    make_tar(path, [("a.png", bytes(1000)), FILES[0]], "w:gz", compresslevel=0)
    content = bytearray(path.read_bytes())
    content[content.index(FILES[0][1]) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="CRC check failed"):
        open_source(str(path))


def test_garbage_between_members_is_not_taken_for_the_end(tmp_path):
    path = tmp_path / "x.tar"
    make_tar(path, FILES)
    content = bytearray(path.read_bytes())
    content[512 * 4 + 150] ^= 1  # in the checksum of the third header
    path.write_bytes(content)
    with pytest.raises(DataError, match="bad header"):
        open_source(str(path))


def test_bad_images_in_a_tar_are_listed(tmp_path):
    files = [("a.png", b""), ("b.png", b"text"), ("c.png", FILES[0][1]), ("d.png", FILES[0][1][:40])]
    a, b, c, d = (item.image for item in open_source(make_tar(tmp_path / "x.tar", files)).read())
    assert (a, b) == ("empty file", "not an image") and not isinstance(c, str) and isinstance(d, str)


def test_headers_of_an_attacker_are_one_error(tmp_path):
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 4
    image = tarfile.TarInfo("a.png")
    nested = (long_name.tobuf() + b"abc\0" + bytes(508)) * 3000 + image.tobuf()
    image.size = 1 << 70
    for headers in (nested, image.tobuf(tarfile.GNU_FORMAT) + bytes(1024)):
        (tmp_path / "x.tar").write_bytes(headers + bytes(1024))
        with pytest.raises(DataError, match="damaged or truncated tar"):
            open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("numbers", ["{0..99999999999}{3..1}", "{3..1}", "{0..100000}"])
def test_a_pattern_that_does_not_count_up_or_too_far(tmp_path, numbers):
    with pytest.raises(DataError, match="must count up, and to at most 100000 files"):
        open_source(str(tmp_path / f"s-{numbers}.tar"))


def test_numbers_too_long_for_a_pattern_are_a_name(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_source(str(tmp_path / f"s-{{0..{'9' * 19}}}.tar"))
