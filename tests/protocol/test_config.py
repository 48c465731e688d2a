"""Configurations: defaults, striding over nodes and groups, and errors that name what they got."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poc_kernels.protocol import UNSET, PoCConfig
from poc_kernels.protocol.distances.form import DISTANCES
from poc_kernels.protocol.fingerprint.form import FINGERPRINT
from poc_kernels.protocol.vectors.form import VECTORS


def config(**changes):
    values = {"block_hash": "block", "block_height": 7, "public_key": "key", "r_target": 1.4, **changes}
    return PoCConfig(**values)


def test_defaults_are_the_protocol_s():
    c = config()
    assert (c.fraud_threshold, c.node_id, c.node_count, c.batch_size, c.seq_len) == (0.01, 0, 1, 32, 256)
    assert c.callback_url is None
    assert c.use_random_projection is False
    assert (c.proof, c.k_dim, c.stronger_rng) == ("distances", None, False)


def test_nonces_of_a_node():
    c = config(node_id=2, node_count=5)
    assert [c.nonce(i) for i in range(4)] == [2, 7, 12, 17]


@given(node_count=st.integers(1, 6), n_groups=st.integers(1, 5))
def test_nodes_and_groups_cover_all_nonces_once(node_count, n_groups):
    nonces = [
        config(node_id=node, node_count=node_count, group_id=group, n_groups=n_groups).nonce(i)
        for node in range(node_count)
        for group in range(n_groups)
        for i in range(4)
    ]
    assert sorted(nonces) == list(range(4 * node_count * n_groups))


@given(node_count=st.integers(1, 6), n_groups=st.integers(1, 5))
def test_nodes_counted_from_one_cover_all_nonces_from_one_once(node_count, n_groups):
    nonces = [
        config(node_id=node, node_count=node_count, group_id=group, n_groups=n_groups).nonce(i)
        for node in range(1, node_count + 1)
        for group in range(n_groups)
        for i in range(4)
    ]
    assert sorted(nonces) == list(range(1, 4 * node_count * n_groups + 1))


@pytest.mark.parametrize("node_id", [0, 1, 4, 5, 6, 2**31 + 1, 2**62])
def test_any_node_id_has_its_nonces(node_id):
    c = config(node_id=node_id, node_count=5, group_id=2, n_groups=3)
    assert [c.nonce(i) for i in (0, 1, 2**30)] == [node_id + 10 + i * 15 for i in (0, 1, 2**30)]


def test_the_offset_of_a_group():
    c = config(node_id=1, node_count=3, group_id=2, n_groups=4)
    assert [c.nonce(i) for i in range(3)] == [7, 19, 31]


@given(
    node_id=st.integers(0, 9),
    node_count=st.integers(1, 4),
    group_id=st.integers(0, 2),
    n_groups=st.integers(3, 5),
    last=st.integers(0, 200),
)
def test_how_many_nonces_a_node_has_up_to_one(node_id, node_count, group_id, n_groups, last):
    c = config(node_id=node_id, node_count=node_count, group_id=group_id, n_groups=n_groups)
    assert c.nonces_up_to(last) == len([i for i in range(last + 1) if c.nonce(i) <= last])


def test_how_many_nonces_there_are_at_most():
    assert config().nonces_up_to(2**63 - 1) == 2**63
    assert config(node_id=2**62, node_count=2**31).nonces_up_to(2**63 - 1) == 2**31
    assert config(node_id=2**31).nonces_up_to(2**31 - 1) == 0


def test_a_node_without_a_place_cannot_generate():
    c = config(node_id=UNSET, node_count=UNSET)
    with pytest.raises(ValueError, match="Node ID and node count must be set to generate: got node_id -1, "):
        c.nonce(0)
    with pytest.raises(ValueError, match="Node ID and node count must be set to generate: got node_id -1, "):
        c.nonces_up_to(7)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_hash": ""}, ValueError, "block_hash must have 1 to 1024 characters, got 0"),
        ({"block_hash": "x" * 1025}, ValueError, "block_hash must have 1 to 1024 characters, got 1025"),
        ({"block_hash": b"x"}, TypeError, "block_hash must be a str, got bytes"),
        ({"block_hash": "\ud800"}, ValueError, "block_hash must be text that UTF-8 can encode"),
        ({"public_key": 3}, TypeError, "public_key must be a str, got int"),
        ({"block_height": -1}, ValueError, "block_height must be in"),
        ({"block_height": 2**63}, ValueError, "block_height must be in"),
        ({"block_height": True}, TypeError, "block_height must be an int, got bool"),
        ({"block_height": 1.0}, TypeError, "block_height must be an int, got float"),
        ({"r_target": 0}, ValueError, "r_target must be positive, got 0"),
        ({"r_target": -0.1}, ValueError, "r_target must be positive, got -0.1"),
        ({"r_target": math.nan}, ValueError, "r_target must be finite, got nan"),
        ({"r_target": 10**400}, ValueError, "r_target must be finite, got an int beyond every float"),
        ({"r_target": "1"}, TypeError, "r_target must be a float, got str"),
        ({"fraud_threshold": -0.1}, ValueError, "fraud_threshold must be a probability"),
        ({"fraud_threshold": math.inf}, ValueError, "fraud_threshold must be finite"),
        ({"node_id": 2**62 + 1}, ValueError, rf"node_id must be in \[-1, {2**62}\], got {2**62 + 1}"),
        ({"node_id": -1}, ValueError, "Node ID and node count must be set together: got node_id -1, node_count 1"),
        ({"node_count": -1}, ValueError, "Node ID and node count must be set together: got node_id 0, node_count -1"),
        ({"node_count": 0}, ValueError, "node_count must be positive, or -1 with node_id for a validator, got 0"),
        ({"node_id": -2}, ValueError, "node_id must be in"),
        ({"group_id": 1}, ValueError, "group_id must be in"),
        ({"n_groups": 0}, ValueError, "n_groups must be in"),
        ({"batch_size": 0}, ValueError, "batch_size must be in"),
        ({"batch_size": 10**9}, ValueError, "batch_size must be in"),
        ({"seq_len": 0}, ValueError, "seq_len must be in"),
        ({"proof": ""}, ValueError, "proof must have 1 to 1024 characters, got 0"),
        ({"proof": 1}, TypeError, "proof must be a str, got int"),
        ({"k_dim": 0}, ValueError, r"k_dim must be in \[1, 256\], got 0"),
        ({"k_dim": 12.0}, TypeError, "k_dim must be an int, got float"),
        ({"stronger_rng": 1}, TypeError, "stronger_rng must be a bool, got int"),
        ({"use_random_projection": 1}, TypeError, "use_random_projection must be a bool, got int"),
        ({"callback_url": 3}, TypeError, "callback_url must be a str or None, got int"),
        ({"callback_url": "ftp://host"}, ValueError, "callback_url must be an http or https URL"),
        ({"callback_url": "http://"}, ValueError, "callback_url must be an http or https URL"),
        ({"callback_url": "http://host:99999"}, ValueError, "callback_url must be an http or https URL"),
        ({"callback_url": "http://a b/"}, ValueError, "callback_url must be an http or https URL"),
        ({"callback_url": "http://host/\n"}, ValueError, "callback_url must be an http or https URL"),
        ({"callback_url": "http://[::1"}, ValueError, "callback_url must be an http or https URL"),
        ({"callback_url": "http://host:0"}, ValueError, "callback_url must be .*, got port 0"),
        ({"callback_url": "http://host:port"}, ValueError, "callback_url must be .*host or port is not valid"),
        ({"callback_url": "http://host/#"}, ValueError, "callback_url must be .*, got one with a fragment"),
        ({"callback_url": "http://host/?a=b#c"}, ValueError, "callback_url must be .*, got one with a fragment"),
        ({"callback_url": "http://host\\@other/"}, ValueError, "callback_url must be .* a backslash"),
        ({"callback_url": "//host/"}, ValueError, "callback_url must be .*, got one without a scheme"),
        ({"callback_url": "http://h/" + "x" * 2040}, ValueError, "at most 2048 characters, .* got 2049 characters"),
    ],
)
def test_bad_values_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        config(**changes)


def test_an_r_target_may_be_missing():
    assert config(r_target=None).r_target is None


IN_THE_KEY = {
    "proof": "vectors",
    "block_hash": "other",
    "batch_size": 31,
    "seq_len": 255,
    "use_random_projection": True,
    "k_dim": 12,
    "stronger_rng": True,
}
NOT_IN_THE_KEY = {
    "block_height": 8,
    "public_key": "other",
    "r_target": 1.3,
    "fraud_threshold": 0.05,
    "node_id": 1,
    "node_count": 5,
    "callback_url": "http://host",
    "n_groups": 3,
}


def test_what_rows_of_two_rounds_need_in_common_to_share_a_forward():
    assert {*IN_THE_KEY, *NOT_IN_THE_KEY, "group_id"} == {field.name for field in dataclasses.fields(PoCConfig)}
    assert config(**NOT_IN_THE_KEY, group_id=2).forward_key() == config().forward_key()
    keys = {config(**{name: value}).forward_key() for name, value in IN_THE_KEY.items()} | {config().forward_key()}
    assert len(keys) == 1 + len(IN_THE_KEY)


def test_a_form_s_own_k_dim_may_be_said_or_not():
    for form in (VECTORS, FINGERPRINT):
        unsaid, said, other = (config(proof=form.name, k_dim=k_dim) for k_dim in (None, form.k_dim, form.k_dim + 1))
        assert form.forward_key(unsaid) == form.forward_key(said) != form.forward_key(other)
        assert unsaid.k_dim is None
    assert DISTANCES.forward_key(config()) == config().forward_key()


@pytest.mark.parametrize("r_target", [5e-324, 1, 2, 2.1, 10, 10.0, 1e308])
def test_any_positive_r_target(r_target):
    assert config(r_target=r_target).r_target == r_target


@pytest.mark.parametrize(
    "url",
    [
        "http://host",
        "HTTPS://host:8443/path/",
        "http://10.0.0.1:80/x?y=z",
        "http://[::1]:9",
        "http://bücher.example/a%2fb",
        "http://user:password@host",
    ],
)
def test_urls_of_callbacks(url):
    assert config(callback_url=url).callback_url == url


@pytest.mark.parametrize("url", ["http://user:s3cret@host:port", "ftp://host?s3cret", "http://host?s3cret#x", "s3cret"])
def test_what_a_url_holds_is_not_shown(url):
    with pytest.raises(ValueError, match="callback_url must be") as refused:
        config(callback_url=url)
    assert "s3cret" not in str(refused.value)
    assert "s3cret" not in repr(config(callback_url="http://user:s3cret@host/?s3cret"))
