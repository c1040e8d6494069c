# shellcheck shell=bash
# Tells uv where packages come from. uv reads none of pip's settings; with an extra index, pip takes a package from either.
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
[ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}
[ -z "${PIP_EXTRA_INDEX_URL:-}" ] || export UV_INDEX=${UV_INDEX:-$PIP_EXTRA_INDEX_URL} UV_INDEX_STRATEGY=unsafe-best-match
