"""Keys, the file of tenants, and what their requests become."""

from pathlib import Path

import orjson
import pytest
import yaml
from multidict import CIMultiDict

from server.auth.credentials import DuplicateHeaderError
from server.auth.limits import Limits, RateLimiter
from server.auth.tenants import Tenants
from server.cli import main
from server.config.base import ConfigError
from server.config.load import load
from server.config.schema import TenantsConfig as Section
from server.config.secrets import hash_key, new_key
from server.protocol.errors import BadRequestError
from server.protocol.model_names import ModelNames
from server.protocol.request import parse_request
from tests.server.conftest import of_vllm

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
NAMES = ModelNames({"m": of_vllm("m", "i")})
HASH = hash_key("k" * 20)


def tenants_of(folder: Path, text: str) -> Tenants:
    file = folder / "tenants.yaml"
    file.write_text(text)
    return Tenants(Section(file=file))


def test_a_new_key_is_shown_once_and_its_lines_fit_the_file(tmp_path: Path, capsys) -> None:
    assert main(["keys", "new", "acme"]) == 0
    printed, notes = capsys.readouterr()
    key = notes.splitlines()[0].rsplit(" ", 1)[1]
    # What is appended to the file must not hold it.
    assert key not in printed
    assert yaml.safe_load(printed) == {"acme": {"keys": [hash_key(key)]}}
    found = tenants_of(tmp_path, printed).find(CIMultiDict({"Authorization": f"Bearer {key}"}))
    assert found is not None
    assert found.name == "acme"
    main(["keys", "new", "acme"])
    assert not any(key in each for each in capsys.readouterr())
    assert main(["keys", "new", "ac me"]) == 2
    assert "TENANT: should be 1 to 64 letters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tenants.file: should hold names with values"),
        ("{}", "tenants.file: should have at least one entry"),
        ("- a", "tenants.file: should hold names with values"),
        ("a: {keys: [", "is no YAML"),
        ("a: {}\na: {}", "is no YAML"),
        ("a: {keys: [ts-secret-secret]}", "tenants.file.a.keys.0: should be sha256: and 64"),
        ("a: {key: x}", "tenants.file.a.key: unknown key; did you mean keys"),
        ("a: {max_requests: 0}", "tenants.file.a.max_requests: should be greater"),
        ("a: {scope: ''}", "tenants.file.a.scope: String should have at least"),
        ("a b: {}", "tenants.file.a b: a tenant's name should be"),
        ("a: {max_requests: yes}", "tenants.file.a.max_requests: should be a number"),
        ("a: {max_requests: }", "tenants.file.a.max_requests: has no value"),
        (f"a: {{keys: ['{HASH}']}}\nb: {{keys: ['{HASH}']}}", "a key stands twice"),
    ],
)
def test_says_what_is_wrong_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tenants_of(tmp_path, text)
    assert "secret" not in str(caught.value)


def test_check_reads_the_file_too(tmp_path: Path, capsys) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("tenants: {file: t.yaml}")
    assert main(["check", "--config", str(config)]) == 2
    assert "tenants.file: " in (message := capsys.readouterr().err)
    assert "No such file" in message
    (tmp_path / "t.yaml").write_text(f"a: {{keys: ['{HASH}']}}")
    assert main(["check", "--config", str(config)]) == 0
    assert str(tmp_path / "t.yaml") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants: {key: short-SECRET}", "tenants.key: should have at least 16 characters"),
        ("tenants: {key: sha256:SECRET}", "tenants.key: should be sha256: and 64"),
        ("tenants: {key: [SECRET]}", "tenants.key: should be text, in quotes"),
        ("tenants: {key: SECRETSECRETSECRET, file: t}", "tenants: file and key: only one"),
        ("admin: {port: 1}", "admin: should have a key"),
        ("admin: {key: 'SECRET SECRET SECRET'}", "admin.key: should have at least 16"),
        ("models: {m: {source: x, api_key: SECRET}}", "models.m: api_key is for upstreams"),
        (
            "models: {m: {upstreams: ['http://me:SECRET@a'], api_key: SECRET}}",
            "models.m: should have an api_key or a password in upstreams",
        ),
        (
            "tiers: {disk: {encryption_key: SECRET}}",
            "tiers.disk.encryption_key: should be",
        ),
        (
            "models: {m: {upstreams: ['http://a'], api_key: 'SE CRET'}}",
            "models.m.api_key: should be ASCII without spaces",
        ),
        ("admin: {key: SECRETSECRETSECRET\n  port: }: SECRET", "c.yaml: can't be read as YAML"),
    ],
)
def test_mistakes_name_the_field_and_not_the_secret(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(file)
    assert "SECRET" not in str(caught.value)


def test_a_configuration_holds_hashes_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    keys = [new_key() for _ in range(3)]
    monkeypatch.setenv("TIERSERVE__TENANTS__KEY", keys[0])
    monkeypatch.setenv("TIERSERVE__ADMIN__KEY", hash_key(keys[1]))
    monkeypatch.setenv("TIERSERVE__MODELS__M__API_KEY", keys[2])
    file = tmp_path / "c.yaml"
    file.write_text("models: {m: {upstreams: ['http://h:1']}}")
    config = load(file)
    assert config.tenants.key == hash_key(keys[0])
    assert config.admin.key == hash_key(keys[1])
    assert keys[2] not in repr(config)
    assert main(["check", "--config", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("'***'") == 3
    assert not any(key in printed or hash_key(key) in printed for key in keys)


def test_who_has_no_key_is_nobody(tmp_path: Path) -> None:
    # Whoever has hashed an empty variable has let nobody in.
    tenants = tenants_of(tmp_path, f"a: {{keys: ['{HASH}', '{hash_key('')}']}}")
    assert tenants.find(CIMultiDict({"Authorization": f"Bearer {'k' * 20}"})) is not None
    for given in ("", "Bearer", "Bearer ", "Bearer  ", "Basic x", HASH, f"Bearer {HASH}"):
        assert tenants.find(CIMultiDict({"Authorization": given})) is None
    assert tenants.find(CIMultiDict({})) is None
    assert tenants.find(CIMultiDict({"x-api-key": ""})) is None


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    tenants = tenants_of(tmp_path, f"a: {{keys: ['{HASH}']}}")
    known = tenants.find(CIMultiDict({"Authorization": f"Bearer {'k' * 20}"}))
    for spaces in range(1, 3000):
        assert (
            tenants.find(CIMultiDict({"Authorization": f"Bearer {' ' * spaces}{'k' * 20}"}))
            is known
        )
        assert tenants.find(CIMultiDict({"Authorization": f"Bearer {spaces}"})) is None
    assert len(tenants._by_header) <= 1024


def test_the_salt_changes_what_is_sent_and_not_the_key(tmp_path: Path) -> None:
    text = "\n".join(
        f"{name}: {{keys: ['{hash_key(name)}'], scope: {scope}}}"
        for name, scope in (("a", "s"), ("b", "s"), ("c", "t"))
    )
    salting = tenants_of(tmp_path, text)
    plain = Tenants(Section(file=tmp_path / "tenants.yaml", cache_salt=False))

    def parsed(tenants: Tenants, name: str, **more):
        tenant = tenants.find(CIMultiDict({"Authorization": f"Bearer {name}"}))
        return parse_request(CHAT, orjson.dumps(BODY | more), tenant, NAMES)

    for more in ({}, {"cache_salt": "mine"}, {"stream": True}):
        one, without = parsed(salting, "a", **more), parsed(plain, "a", **more)
        assert one.key == without.key == parsed(salting, "b", **more).key
        assert one.key != parsed(salting, "c", **more).key
        assert without.raw == orjson.dumps(BODY | more)
        for sent in (one.body, one.raw):
            assert len(orjson.loads(sent)["cache_salt"]) == 73
        assert orjson.loads(one.body).keys() == orjson.loads(without.body).keys() | {"cache_salt"}
        assert one.labels == ("model:m", "tenant:a")
    assert parsed(salting, "a").key != parsed(salting, "a", cache_salt="mine").key


def test_a_salted_body_is_otherwise_as_it_was_sent(tmp_path: Path) -> None:
    tenant = tenants_of(tmp_path, f"a: {{keys: ['{HASH}']}}").find(
        CIMultiDict({"Authorization": f"Bearer {'k' * 20}"})
    )
    assert tenant is not None
    for raw in (
        b'{ "model" : "m", "temperature" : 1.50, "x":1e0 } \n',
        b'{"model":"m"}',
        b'{"model":"m","a":12345678901234567890123}',
    ):
        sent = parse_request(CHAT, raw, tenant, NAMES).raw
        assert sent.startswith(raw.rstrip()[:-1])
        assert orjson.loads(sent)["cache_salt"] == tenant.salt
    # Nor does a name that is written otherwise, or twice, get past it.
    for raw in (b'{"cache\\u005fsalt":"x"}', b'{"cache_salt":"x","a":1,"cache_salt":"y"}'):
        sent = parse_request(CHAT, raw, tenant, NAMES).raw
        assert sent.count(b"salt") == 1
        assert len(orjson.loads(sent)["cache_salt"]) == 73


def sent_for(tenants: Tenants, name: str, **more) -> dict:
    tenant = tenants.find(CIMultiDict({"Authorization": f"Bearer {name}"}))
    return orjson.loads(parse_request(CHAT, orjson.dumps(BODY | more), tenant, NAMES).body)


def test_media_are_found_again_by_their_tenant_alone(tmp_path: Path) -> None:
    text = "\n".join(
        f"{name}: {{keys: ['{hash_key(name)}'], scope: {scope}}}"
        for name, scope in (("a", "s"), ("b", "s"), ("c", "t"))
    )
    tenants = tenants_of(tmp_path, text)
    image = {"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "logo"}
    word = {"type": "text", "text": "uuid"}
    messages = [{"role": "user", "content": [word, image]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"uuid": "logo"}}}]
    asked = {"messages": messages, "tools": tools, "content": [{"uuid": None}]}
    sent_by = {name: sent_for(tenants, name, **asked) for name in "abc"}
    ids = {name: sent["messages"][0]["content"][1].pop("uuid") for name, sent in sent_by.items()}
    assert ids["a"] == ids["b"] != ids["c"]
    assert "logo" not in ids.values()
    # vLLM takes any value for the text of it.
    for odd in (5, 0, "", False):
        numbered = [{"role": "user", "content": [image | {"uuid": odd}]}]
        (one, other) = (
            sent_for(tenants, name, messages=numbered)["messages"][0]["content"][0]["uuid"]
            for name in "ac"
        )
        assert one != other
        assert len(one) == len(other) == 64
    # All else is as it was.
    for sent in sent_by.values():
        del sent["cache_salt"]
        sent["messages"][0]["content"][1]["uuid"] = "logo"
        assert sent == BODY | asked
    escaped = orjson.dumps(BODY | asked).replace(b'"uuid":"logo"}]', b'"\\u0075uid":"logo"}]')
    tenant = tenants.find(CIMultiDict({"Authorization": "Bearer c"}))
    sent = orjson.loads(parse_request(CHAT, escaped, tenant, NAMES).raw)
    assert sent["messages"][0]["content"][1]["uuid"] == ids["c"]


def test_transfers_are_for_operators(tmp_path: Path) -> None:
    text = f"a: {{keys: ['{hash_key('a')}']}}\nb: {{keys: ['{hash_key('b')}'], operator: true}}"
    tenants = tenants_of(tmp_path, text)
    for name in ("kv_transfer_params", "ec_transfer_params"):
        asked = {name: {"remote_block_ids": [1]}}
        with pytest.raises(BadRequestError, match=f"{name} takes an operator's key"):
            sent_for(tenants, "a", **asked)
        assert sent_for(tenants, "b", **asked)[name] == asked[name]
        assert sent_for(tenants, "a", **{name: None})[name] is None


def test_each_reading_of_the_file_is_a_revision(tmp_path: Path) -> None:
    tenants = tenants_of(tmp_path, f"a: {{keys: ['{HASH}']}}")
    headers = CIMultiDict({"Authorization": f"Bearer {'k' * 20}"})
    before = tenants.find(headers)
    tenants.use(tenants.read())
    after = tenants.find(headers)
    assert before is not None
    assert after is not None
    assert before.revision != after.revision


def test_headers_that_stand_twice_are_a_mistake(tmp_path: Path) -> None:
    for tenants in (Tenants(Section()), tenants_of(tmp_path, f"a: {{keys: ['{HASH}']}}")):
        for name in ("Authorization", "x-api-key"):
            with pytest.raises(DuplicateHeaderError, match=f"{name} should stand once") as caught:
                tenants.find(CIMultiDict([(name, "a"), (name, "a")]))
            assert caught.value.header == name


def test_limiters_outlive_a_change(tmp_path: Path) -> None:
    made = []

    def new_limiter(name: str, limits: Limits) -> RateLimiter:
        made.append((name, limits))
        return RateLimiter(limits)

    file = tmp_path / "t.yaml"
    file.write_text(f"a: {{keys: ['{HASH}'], max_requests: 1}}")
    tenants = Tenants(Section(file=file), new_limiter)
    tenants.limiters["a"].acquire()
    file.write_text(f"a: {{keys: ['{hash_key('other' * 9)}'], max_requests: 2}}")
    tenants.use(tenants.read())
    assert made == [("a", Limits(max_requests=1))]
    assert tenants.limiters["a"].active == 1
    assert tenants.find(CIMultiDict({"Authorization": f"Bearer {'k' * 20}"})) is None
    assert tenants.find(CIMultiDict({"Authorization": f"Bearer {'other' * 9}"})) is not None
