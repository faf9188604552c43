#!/bin/bash
# Compiles as "cc" does. A file whose preprocessed text was compiled before gets the stored object.
# OBJECT_CACHE is the folder of the objects.
set -e
[[ " $* " == *" -c "* ]] || exec cc "$@"
words=()
while (($#)); do
    case $1 in
        -c) ;;
        -o) object=$2; shift ;;
        *) words+=("$1") ;;
    esac
    shift
done
text=$(cc -E -P "${words[@]}")
stored=$OBJECT_CACHE/$(sha1sum <<< "${words[*]} $text" | cut -c1-40).o
if [[ ! -e $stored ]]; then
    mkdir -p "$OBJECT_CACHE"
    cc -c "${words[@]}" -o "$stored.$$"
    mv "$stored.$$" "$stored"
fi
cp "$stored" "$object"
