#!/usr/bin/env bash
# Unpacks the C and C++ headers of onnxruntime into DIRECTORY, from Debian's package libonnxruntime-dev; changes nothing
# else on this machine. Prints the directory for -DONNXRUNTIME_INCLUDE_DIR.
#
#     examples/cpp/fetch_headers.sh DIRECTORY
#
# Debian has the package from its release 13 (trixie) on, and older releases can use its headers, too. The interface is
# versioned: headers of an older release work with a newer library.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 DIRECTORY" >&2; exit 2; }
mkdir -p "$1"
target=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/sources" "$work/lists/partial" "$work/cache/archives/partial"
# The mirror that this machine uses already.
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null \
  | grep -oE '^(URIs:|deb)[[:space:]].*' | grep -oE '[a-z]+://[^[:space:]]+/debian/?([[:space:]]|$)' | head -n 1 | tr -d '[:space:]' || true)
[ -n "$mirror" ] || { echo "error: no Debian mirror is set up here; install libonnxruntime-dev by hand." >&2; exit 2; }
cat >"$work/sources/trixie.sources" <<SOURCES
Types: deb
URIs: $mirror
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
apt=(apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/sources"
  -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
"${apt[@]}" update >&2
(cd "$work" && "${apt[@]}" download libonnxruntime-dev >&2 && dpkg -x libonnxruntime-dev_*.deb unpacked)
cp "$work"/unpacked/usr/include/onnxruntime/*.h "$target"
echo "$target"
