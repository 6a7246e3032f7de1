"""What is pushed to the Hub, by an API that records it, and the cards that are pushed."""

import pytest
import yaml
from huggingface_hub import HfApi
from tiny_models import D, make_model

from sparseffn_jax.checkpoints import hub
from sparseffn_jax.checkpoints.cards import adapter_card, model_card, origin_of, table
from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from sparseffn_jax.config import CoreConfig, MicroRefinementConfig, SparseFFNConfig
from sparseffn_jax.measure.costs import flops_ratio

LAYER = SparseFFNConfig(D, 4 * D, micro=MicroRefinementConfig(CoreConfig(24)))


@pytest.fixture
def me(monkeypatch):
    """What the Hub says of who one is; tests change it."""
    user = {
        "name": "me",
        "orgs": [{"name": "friends"}],
        "auth": {"accessToken": {"role": "write"}},
    }
    monkeypatch.setattr(HfApi, "whoami", lambda self, token=None: user)
    return user


@pytest.fixture
def pushed(me, monkeypatch):
    """What is pushed: the repositories that are made, and the files of each commit."""

    class Answer(str):
        repo_id = property(lambda self: str(self))
        commit_url = property(lambda self: f"https://hub/{self}/commit/1")

    made = {"repositories": [], "commits": []}

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        made["repositories"].append((repo_id, private, exist_ok, self.token))
        return Answer(repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_commit(self, repo_id, operations, *, commit_message):
        files = {each.path_in_repo: each.path_or_fileobj for each in operations}
        contents = {name: open(path, "rb").read() for name, path in files.items()}  # noqa: SIM115
        made["commits"].append((repo_id, contents))
        return Answer(repo_id)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return made


@pytest.fixture
def folder(tmp_path):
    model, params = make_model("gpt2", (LAYER, None))
    save_pretrained(tmp_path / "model", model, params, card="My own card.\n")
    return tmp_path / "model"


def metadata(card):
    _, data, text = card.split("---\n", 2)
    return yaml.safe_load(data), text


def test_the_files_of_a_folder_are_pushed_and_nothing_else(folder, pushed):
    (folder / ".env").write_text("secret")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state").write_text("large")
    (folder.parent / "metrics.jsonl").write_text("{}")
    url = hub.push_to_hub(folder, "sparse", private=True, token="hf_mine")
    assert url == "https://hub/me/sparse/commit/1"
    assert pushed["repositories"] == [("sparse", True, True, "hf_mine")]
    ((repo, contents),) = pushed["commits"]
    assert repo == "me/sparse"
    names = ("README.md", "config.json", "model.safetensors", "modeling_sparseffn.py")
    assert contents == {name: (folder / name).read_bytes() for name in names}


def test_a_link_to_elsewhere_is_not_pushed(folder, pushed):
    (folder.parent / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to(folder.parent / "secret")
    with pytest.raises(CheckpointError, match=r"has notes\.txt as a link to a file elsewhere"):
        hub.push_to_hub(folder, "sparse")
    assert pushed == {"repositories": [], "commits": []}


def test_a_model_without_a_card_gets_one(folder, pushed):
    (folder / "README.md").unlink()
    hub.push_to_hub(folder, "friends/sparse")
    ((_, contents),) = pushed["commits"]
    data, text = metadata(contents["README.md"].decode())
    assert data["library_name"] == "transformers"
    assert 'from_pretrained("friends/sparse", trust_remote_code=True)' in text
    assert contents["README.md"] == (folder / "README.md").read_bytes()


def test_a_model_in_memory_is_pushed(folder, pushed):
    hub.push_to_hub(load_pretrained(folder), "sparse")
    ((_, contents),) = pushed["commits"]
    assert contents.keys() == {path.name for path in folder.iterdir()}
    assert contents["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"# sparse\n" in contents["README.md"]


@pytest.mark.parametrize(
    ("repo_id", "user", "message"),
    [
        ("a b/c", {}, "'a b/c' cannot be the name of a repository"),
        ("a/b/c", {}, "'a/b/c' cannot be the name of a repository"),
        ("google/x", {}, "me may write to me, friends alone"),
        ("me/x", {"auth": {"accessToken": {"role": "read"}}}, "the token of me may only read"),
    ],
)
def test_who_may_not_write_is_told_first(folder, pushed, me, repo_id, user, message):
    me.update(user)
    with pytest.raises(CheckpointError, match=message):
        hub.push_to_hub(folder, repo_id)
    assert pushed == {"repositories": [], "commits": []}


def test_nobody_is_logged_in(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(CheckpointError, match=r"does not know who you are .*hf auth login"):
        hub.check_push("me/x")


def test_a_push_that_fails_says_so(folder, pushed, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("409\nconflict")

    monkeypatch.setattr(HfApi, "create_commit", fail)
    with pytest.raises(CheckpointError, match="was not pushed to sparse: 409 conflict"):
        hub.push_to_hub(folder, "sparse")


def test_what_is_no_model(tmp_path, me):
    with pytest.raises(CheckpointError, match="is not a folder"):
        hub.push_to_hub(tmp_path / "nowhere", "x")
    with pytest.raises(CheckpointError, match=r"has neither config\.json nor adapter_config\.json"):
        hub.push_to_hub(tmp_path, "x")


def test_a_card_says_what_the_model_is_made_of(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\nBase.\n")
    origin = origin_of(tmp_path / "base", tmp_path / "base")
    # Its own base is not ours.
    assert (origin.name, origin.hub_name, origin.license) == ("base", None, "mit")
    model, params = make_model("gpt2", (LAYER, LAYER))
    data, text = metadata(model_card("me/sparse", model, params, origin, "## Converted\n\nSo."))
    assert data == {
        "license": "mit", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["sparseffn_jax", "sparse"],
    }  # fmt: skip
    assert str(tmp_path) not in text
    assert f"| FFN FLOPs | 1 | {flops_ratio(LAYER):.3f} |" in text
    dense = sum(leaf.size for leaf in leaves(make_model("gpt2")[1]))
    assert f"| parameters | {dense:,} | {sum(leaf.size for leaf in leaves(params)):,} |" in text
    assert f"| 0-1 | core: 24 units, density 1.00 and 1.00 | {flops_ratio(LAYER):.3f} |" in text


def leaves(tree):
    return [leaf for v in tree.values() for leaf in (leaves(v) if isinstance(v, dict) else [v])]


def test_a_card_takes_over_how_its_base_was_made(tmp_path):
    model, params = make_model("gpt2", (LAYER, None))
    first = model_card("sparse", model, params, origin_of("gpt2", None), "## Converted\n\nSo.")
    save_pretrained(tmp_path / "sparse", model, params, card=first)
    origin = origin_of(tmp_path / "sparse", tmp_path / "sparse")
    second = model_card("me/tuned", model, params, origin, "## Fine-tuned\n\nThen.")
    data, text = metadata(second)
    assert data["base_model"] == "gpt2"
    assert text.index("## Converted\n\nSo.") < text.index("## Fine-tuned\n\nThen.")
    adapter, text = metadata(adapter_card("me/lora", model, origin, "## Fine-tuned\n\nThen."))
    assert (adapter["library_name"], adapter["base_model"]) == ("peft", "gpt2")
    assert "## Converted\n\nSo." in text
    assert 'from_pretrained("sparse", trust_remote_code=True)' in text
    dense = make_model("gpt2")[0]
    assert "trust_remote_code" not in adapter_card("me/lora", dense, origin_of("gpt2", None))


@pytest.mark.parametrize(
    "card", [b"---\n- a\n---\n", b"---\nlicense: [1\n---\n", b"\xff\xfe", b"---\nlicense: 3\n---\n",
             b"---\ntags: 7\nlicense: {a: 1}\nbase_model: 3\n---\n", b"", b"x" * 2**21]
)  # fmt: skip
def test_cards_of_others_that_say_nothing(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card)
    origin = origin_of(tmp_path, tmp_path)
    assert (origin.hub_name, origin.license, origin.sections) == (None, None, "")


def test_what_was_downloaded_has_its_name_on_the_hub(tmp_path):
    folder = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    assert (
        origin_of(folder, folder).hub_name == origin_of("org/name", folder).hub_name == "org/name"
    )


def test_tables():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
