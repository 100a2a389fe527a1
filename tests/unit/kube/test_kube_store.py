"""The watch cache: newest wins, the dead stay dead, and look-ups by label."""

from __future__ import annotations

from typing import Any

import pytest

from tightship.api.v1alpha1 import labels
from tightship.kube.store import Store


def make_pod(name: str, version: int, uid: str = "", namespace: str = "a", **carried: str) -> dict[str, Any]:
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid or name,
            "resourceVersion": str(version),
            "labels": {f"tightship.dev/{key}": value for key, value in carried.items()},
        },
    }


def names(objects: list[Any]) -> list[str]:
    return [obj["metadata"]["name"] for obj in objects]


def test_an_older_version_that_arrives_late_changes_nothing() -> None:
    store = Store()
    assert store.observe(make_pod("p", 10, pack="new"))
    assert not store.observe(make_pod("p", 9, pack="old"))
    assert not store.observe(make_pod("p", 10, pack="same"))
    assert names(store.list("Pod", label=(labels.PACK, "new"))) == ["p"]
    assert store.list("Pod", label=(labels.PACK, "old")) == []


def test_versions_are_numbers_not_texts() -> None:
    store = Store()
    store.observe(make_pod("p", 9))
    assert store.observe(make_pod("p", 10))


def test_a_deleted_object_does_not_come_back_by_a_late_answer() -> None:
    store = Store()
    pod = make_pod("p", 5)
    store.observe(pod)
    assert store.forget(make_pod("p", 7))
    assert not store.observe(make_pod("p", 6))
    assert store.get("Pod", "a", "p") is None


@pytest.mark.parametrize(("version", "shown"), [(6, False), (7, False), (9, True)])
def test_an_object_that_lost_its_label_comes_back_with_it(version: int, shown: bool) -> None:
    """A watch by label says DELETED of an object that lost the label: the same object may carry it again."""
    store = Store()
    store.observe(make_pod("p", 5))
    store.forget(make_pod("p", 7), "7")
    assert store.observe(make_pod("p", version)) is shown
    assert (store.get("Pod", "a", "p") is not None) is shown


def test_an_object_of_the_same_name_outlives_the_news_of_its_predecessors_end() -> None:
    store = Store()
    store.observe(make_pod("p", 5, uid="one"))
    store.observe(make_pod("p", 9, uid="two"))
    assert not store.forget(make_pod("p", 7, uid="one"))
    found = store.get("Pod", "a", "p")
    assert found is not None
    assert found["metadata"]["uid"] == "two"


@pytest.mark.parametrize(
    ("namespace", "label", "expected"),
    [
        (None, None, ["p", "q", "p"]),
        ("a", None, ["p", "q"]),
        (None, (labels.PACK, "x"), ["p", "p"]),
        ("b", (labels.PACK, "x"), ["p"]),
        (None, ("other", "x"), []),
    ],
)
def test_listing(namespace: str | None, label: tuple[str, str] | None, expected: list[str]) -> None:
    store = Store()
    store.observe(make_pod("p", 1, uid="1", pack="x"))
    store.observe(make_pod("q", 2, uid="2", pack="y"))
    store.observe(make_pod("p", 3, uid="3", namespace="b", pack="x"))
    assert names(store.list("Pod", namespace, label)) == expected


def test_a_label_that_changes_moves_the_object_in_the_index() -> None:
    store = Store()
    store.observe(make_pod("p", 1, pack="x"))
    store.observe(make_pod("p", 2, pack="y"))
    assert store.list("Pod", label=(labels.PACK, "x")) == []
    assert names(store.list("Pod", label=(labels.PACK, "y"))) == ["p"]


def test_a_listing_removes_what_it_lacks_but_not_what_was_written_after_it() -> None:
    store = Store()
    store.observe(make_pod("gone", 3))
    store.observe(make_pod("kept", 4))
    store.observe(make_pod("written-since", 12))
    store.replace("Pod", [make_pod("kept", 8)], "10")
    assert names(store.list("Pod")) == ["kept", "written-since"]


def test_every_change_is_told_once_with_before_and_after() -> None:
    told: list[tuple[Any, Any]] = []

    def version(obj: Any) -> Any:
        return obj and obj["metadata"]["resourceVersion"]

    store = Store(lambda kind, before, after: told.append((version(before), version(after))))
    store.observe(make_pod("p", 1))
    store.observe(make_pod("p", 1))
    store.observe(make_pod("p", 2))
    store.forget(make_pod("p", 3))
    store.forget(make_pod("p", 3))
    assert told == [(None, "1"), ("1", "2"), ("2", None)]


def test_an_index_of_the_owner_s_own_follows_every_version() -> None:
    def nodes(store: Store, obj: Any) -> list[str]:
        return [obj["spec"]["nodeName"]] if obj["spec"].get("nodeName") else []

    store = Store(indexers={"Pod": {"node": nodes}})
    pod = make_pod("p", 1)
    store.observe(pod | {"spec": {}})
    assert store.by("Pod", "node", "n1") == []
    store.observe(make_pod("p", 2) | {"spec": {"nodeName": "n1"}})
    assert names(store.by("Pod", "node", "n1")) == ["p"]
    store.observe(make_pod("p", 3) | {"spec": {"nodeName": "n2"}})
    assert store.by("Pod", "node", "n1") == []
    assert names(store.by("Pod", "node", "n2", "default")) == []
    store.forget(make_pod("p", 4))
    assert store.by("Pod", "node", "n2") == []


def test_what_one_version_comes_to_is_worked_out_once_and_anew_for_the_next() -> None:
    worked: list[str] = []

    def length(obj: Any) -> int:
        worked.append(obj["metadata"]["resourceVersion"])
        return len(obj["metadata"]["name"])

    store = Store()
    first, second = make_pod("p", 1), make_pod("p", 2)
    store.observe(first)
    assert [store.derive(first, length), store.derive(first, length)] == [1, 1]
    store.observe(second)
    assert [store.derive(second, length), store.derive(second, length)] == [1, 1]
    assert worked == ["1", "2"]
    # A version that isn't shown any more is answered, and not remembered.
    store.derive(first, length)
    store.derive(first, length)
    assert worked == ["1", "2", "1", "1"]


def test_what_rests_on_other_objects_too_is_worked_out_anew_when_one_of_them_is_another() -> None:
    store, worked = Store(), []
    pod, other, third = make_pod("p", 1), make_pod("q", 1, uid="2"), make_pod("q", 2, uid="2")
    store.observe(pod)
    for beside in (other, other, third, third):
        store.derive_with(pod, "pair", (beside,), lambda beside=beside: worked.append(beside))  # type: ignore[misc]
    assert worked == [other, third]


def test_what_a_kind_comes_to_is_worked_out_when_one_of_it_changed() -> None:
    worked: list[int] = []

    def count(objects: list[Any]) -> int:
        worked.append(len(objects))
        return len(objects)

    store = Store()
    store.observe(make_pod("p", 1))
    assert [store.summarise("Pod", count), store.summarise("Pod", count)] == [1, 1]
    store.observe(make_pod("q", 2, uid="2"))
    store.forget(make_pod("p", 3))
    assert store.summarise("Pod", count) == 1
    assert worked == [1, 1]


def test_an_index_that_nobody_keeps_is_an_error_and_not_an_empty_answer() -> None:
    with pytest.raises(LookupError, match="Pod has no index nodes"):
        Store().by("Pod", "nodes", "n1")
