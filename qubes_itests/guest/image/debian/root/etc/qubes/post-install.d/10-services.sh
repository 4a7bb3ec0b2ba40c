#!/bin/sh
# Note for dom0 which services there are, of a VM that keeps them.
case $(qubesdb-read /qubes-vm-persistence) in
    full) place=/etc/qubes-rpc ;;
    rw-only) place=/usr/local/etc/qubes-rpc ;;
    *) exit 0 ;;
esac
for service in "$place"/*; do
    if [ -S "$service" ] || { [ -f "$service" ] && [ -x "$service" ]; }; then
        service=${service##*/}
        set -- "$@" "supported-rpc.${service%%+*}=1"
    fi
done
[ $# -eq 0 ] || qvm-features-request "$@"
