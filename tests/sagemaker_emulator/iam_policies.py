"""Identity-based IAM policies, and whether they allow what a request does.

What a policy document may hold is what this project's policies use: actions, resources, and the conditions of
`CONDITION_KEYS` with the operators of `_OPERATORS`. Everything else is refused when a document is parsed: a policy that
is understood in part would allow, or refuse, what AWS does not.
"""

import enum
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

VERSION = "2012-10-17"
CONDITION_KEYS = ("s3:prefix", "iam:PassedToService", "cloudwatch:namespace")
_IF_EXISTS = "IfExists"
_STATEMENT = {"Sid", "Effect", "Action", "Resource", "Condition"}
_ARN_PARTS = 6  # arn:partition:service:region:account:resource


class PolicyError(ValueError):
    """A policy document that is wrong, or holds what is not emulated."""


class Decision(enum.Enum):
    """The outcome, in the words of AWS's message."""

    ALLOWED = "allowed"
    NOT_ALLOWED = "because no identity-based policy allows the {action} action"
    DENIED = "with an explicit deny in an identity-based policy"


@dataclass(frozen=True)
class Access:
    """One thing that a request does: an action on a resource, with the condition keys that the request has."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Condition:
    """An operator with one key: true if the request's value matches any of `values`."""

    operator: str
    key: str
    values: tuple[str, ...]
    if_exists: bool

    def holds(self, context: Mapping[str, str]) -> bool:
        """Whether the request meets it. A key that the request does not have meets it only with `…IfExists`."""
        found = {name.lower(): value for name, value in context.items()}.get(self.key.lower())
        if found is None:
            return self.if_exists
        return any(_OPERATORS[self.operator](value, found) for value in self.values)


@dataclass(frozen=True)
class Statement:
    """One statement of a policy."""

    effect: str
    actions: tuple[str, ...]
    resources: tuple[str, ...]
    conditions: tuple[Condition, ...] = ()

    def applies(self, access: Access) -> bool:
        """Whether it speaks of this access."""
        return (
            any(matches(pattern.lower(), access.action.lower()) for pattern in self.actions)
            and any(arn_matches(pattern, access.resource) for pattern in self.resources)
            and all(condition.holds(access.context) for condition in self.conditions)
        )


def decide(statements: Iterable[Statement], access: Access) -> Decision:
    """What the statements of all policies together say: Deny beats Allow, and what nothing allows is refused."""
    effects = {statement.effect for statement in statements if statement.applies(access)}
    if "Deny" in effects:
        return Decision.DENIED
    return Decision.ALLOWED if "Allow" in effects else Decision.NOT_ALLOWED


def parse_policy(document: str | Mapping[str, Any]) -> tuple[Statement, ...]:
    """The statements of a policy document. Raises `PolicyError`."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    return _parse(text)


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> tuple[Statement, ...]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise PolicyError(f"a policy that is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("Version") != VERSION:
        raise PolicyError(f'a policy must be an object with "Version": "{VERSION}"')
    if unknown := sorted(content.keys() - {"Version", "Id", "Statement"}):
        raise PolicyError(f"a policy with {', '.join(unknown)}, which is not emulated")
    statements = content.get("Statement")
    if not statements:
        raise PolicyError("a policy without a Statement")
    return tuple(_statement(each) for each in ([statements] if isinstance(statements, dict) else statements))


def _statement(content: Mapping[str, Any]) -> Statement:
    name = f"statement {content.get('Sid', content)}"
    if unknown := sorted(content.keys() - _STATEMENT):
        raise PolicyError(f"{name} with {', '.join(unknown)}, which is not emulated")
    if content.get("Effect") not in ("Allow", "Deny"):
        raise PolicyError(f"{name}: Effect must be Allow or Deny")
    actions, resources = (_texts(content.get(member), f"{name}: {member}") for member in ("Action", "Resource"))
    for action in actions:
        if action != "*" and not re.fullmatch(r"[A-Za-z0-9-]+:[A-Za-z0-9*?]+", action):
            raise PolicyError(f"{name}: {action} is no action; write service:Operation")
    for resource in resources:
        if resource != "*" and resource.count(":") < _ARN_PARTS - 1:
            raise PolicyError(f"{name}: {resource} is no ARN")
    conditions = tuple(
        _condition(name, operator, key, values)
        for operator, keys in content.get("Condition", {}).items()
        for key, values in keys.items()
    )
    return Statement(content["Effect"], actions, resources, conditions)


def _condition(name: str, written: str, key: str, values: Any) -> Condition:
    operator = written.removesuffix(_IF_EXISTS)
    if operator not in _OPERATORS:
        raise PolicyError(f"{name}: the operator {written} is not emulated; there are {', '.join(_OPERATORS)}")
    if key.lower() not in map(str.lower, CONDITION_KEYS):
        raise PolicyError(f"{name}: the condition key {key} is not emulated; there are {', '.join(CONDITION_KEYS)}")
    return Condition(operator, key, _texts(values, f"{name}: {key}"), written.endswith(_IF_EXISTS))


def _texts(value: Any, what: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value or ())
    if not texts or not all(isinstance(text, str) for text in texts):
        raise PolicyError(f"{what} must be a text or a list of texts")
    if variable := next((text for text in texts if "${" in text), None):
        raise PolicyError(f"{what}: the policy variable in {variable} is not emulated")
    return texts


def arn_matches(pattern: str, arn: str) -> bool:
    """Whether a resource pattern covers an ARN. A wildcard stays within its part, up to the last part."""
    if pattern == "*":
        return True
    patterns, parts = pattern.split(":", _ARN_PARTS - 1), arn.split(":", _ARN_PARTS - 1)
    return len(patterns) == len(parts) and all(map(matches, patterns, parts))


def matches(pattern: str, text: str) -> bool:
    """Whether `text` is what `pattern` says: `*` stands for any characters, `?` for one."""
    return _compiled(pattern).fullmatch(text) is not None


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = (".*" if char == "*" else "." if char == "?" else re.escape(char) for char in pattern)
    return re.compile("".join(parts), re.DOTALL)


_OPERATORS: dict[str, Callable[[str, str], bool]] = {"StringEquals": str.__eq__, "StringLike": matches}
