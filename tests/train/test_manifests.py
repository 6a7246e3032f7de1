import os

import pytest

from sparseffn_jax.train.manifests import find_damage, is_sealed, seal


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "7"
    (folder / "ffn").mkdir(parents=True)
    (folder / "ffn" / "a").write_bytes(b"weights")
    (folder / "b").write_bytes(b"position")
    seal(folder, "step 7")
    return folder


def test_a_sealed_folder_is_whole(sealed):
    assert is_sealed(sealed)
    assert find_damage(sealed, "step 7") is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: flip(f / "ffn" / "a"), "ffn/a has changed since it was written"),
        (lambda f: os.truncate(f / "b", 3), "b has changed"),
        (lambda f: (f / "ffn" / "a").unlink(), "ffn/a is missing"),
        (lambda f: (f / "stray").touch(), "stray is not of it"),
        (lambda f: (f / "manifest.json").unlink(), "was not written to the end"),
        (lambda f: os.truncate(f / "manifest.json", 40), "its manifest is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "its manifest is damaged"),
        (lambda f: (f / "b").rename(f / "c"), "b is missing"),
    ],
)
def test_damage_is_found_and_named(sealed, damage, reason):
    damage(sealed)
    assert reason in find_damage(sealed, "step 7")


def test_swapped_files_and_folders_are_found(sealed):
    a, b, aside = sealed / "ffn" / "a", sealed / "b", sealed.with_name("aside")
    for source, target in ((a, aside), (b, a), (aside, b)):
        source.rename(target)
    assert "has changed" in find_damage(sealed, "step 7")
    assert find_damage(sealed, "step 8") == "it holds step 7, not step 8"
