"""The claims of an identity token, once its issuer's signature, its audience and its times hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# Public-key signatures only: with HS256 in this list, an issuer's public key would do as its secret.
ALGORITHMS: Final = ("RS256", "ES256")
_LEEWAY = 30  # Seconds by which clocks may differ.


def claims_of(token: str, issuers: Mapping[str, Mapping[str, Any]], *, audience: str) -> dict[str, Any]:
    """All claims of a token that one of `issuers` (address -> JWKS) signed for `audience`; ValueError says why not."""
    try:
        import jwt
    except ModuleNotFoundError:
        raise ValueError("this Hub lacks PyJWT: pip install 'hubforge[hub]'") from None
    try:
        header = jwt.get_unverified_header(token)
        # Only to choose the keys; the signature below covers it.
        issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
        if not isinstance(issuer, str) or issuer not in issuers:
            raise ValueError("its issuer is not known here")
        if header.get("alg") not in ALGORITHMS:
            raise ValueError(f"it is not signed with {' or '.join(ALGORITHMS)}")
        keys = [
            key
            for key in jwt.PyJWKSet.from_dict(dict(issuers[issuer])).keys
            if key.algorithm_name == header["alg"] and key.key_id == header.get("kid", key.key_id)
        ]
        if not keys:
            raise ValueError("its issuer has no such key")
        claims: dict[str, Any] = jwt.decode(
            token,
            keys[0],
            algorithms=list(ALGORITHMS),
            audience=audience,
            issuer=issuer,
            leeway=_LEEWAY,
            options={"require": ["exp", "iat", "iss", "aud", "sub"]},
        )
    except jwt.PyJWTError as error:
        raise ValueError(f"{type(error).__name__.removesuffix('Error')}: {error}") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None
    return claims
