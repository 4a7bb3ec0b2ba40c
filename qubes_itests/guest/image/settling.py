"""Work of systemd at boot, as far as it can be done once, with the image.

Packages and apps bring users (sysusers.d), files (tmpfiles.d) and modules to load
(modules-load.d) as descriptions, and rely on systemd to make them at boot. With the
agent as process 1 nobody would. What they make on the disk is a part of the image; what
is in ``/run`` is kept in the image, and copied by the agent at each start, which takes
milliseconds in place of a program's half second.
"""

from __future__ import annotations

from typing import Final

__all__ = ["SETTLE"]

#: For ``sh -e``, run in the image's root with a ``/run`` and a ``/proc`` of its own. Of
#: what systemd-tmpfiles says, its unit takes 65 and 73 for success as well. ``nologin``
#: is for the time until systemd is up. The image is marked as up to date, so that
#: systemd as process 1 does not make users and indexes anew at each start.
#:
#: While that waits for the VM's identity it can read the units that come later, unless
#: one of them has the host name, the machine ID or the boot ID in it. It can make the
#: files in /run then, unless one of them has these, too (those of systemd's own are of
#: journals, or removed with age), or is on the private disk, or is one on the root that
#: has new contents at each start.
#:
#: Where the session of the user begins without logind, that starts later: who asks it
#: something waits for its start. From systemd 256 on the session is one of logind's.
SETTLE: Final = """\
command -v systemd-tmpfiles >/dev/null || exit 0
make_files() {
    systemd-tmpfiles --create --boot "$@" || case $? in
        65 | 73) ;;
        *) return 1 ;;
    esac
}
systemd-sysusers
elsewhere=
for place in dev proc run sys tmp; do
    elsewhere="$elsewhere --exclude-prefix=/$place"
done
make_files $elsewhere
find /run -xdev -mindepth 1 -delete
make_files --prefix=/run
rm -f /run/nologin
rm -rf /usr/lib/qubes/run /usr/lib/qubes/load-modules
cp -a /run /usr/lib/qubes/run
if [ -x /usr/lib/systemd/systemd-modules-load ] &&
    grep -Eqsv '^[[:space:]]*([#;]|$)' /etc/modules-load.d/*.conf \
        /usr/local/lib/modules-load.d/*.conf /usr/lib/modules-load.d/*.conf; then
    ln -s ../systemd/systemd-modules-load /usr/lib/qubes/load-modules
fi
waiting=/etc/systemd/system/qubes-waiting.target.d
rm -rf "$waiting" /etc/systemd/user/qubes-waiting.target.d
mkdir -p "$waiting"
for place in system user; do
    if ! grep -EqsR --exclude=systemd-journald@.service '%[bHlmq]' \
        /etc/systemd/$place /usr/local/lib/systemd/$place /usr/lib/systemd/$place; then
        mkdir -p /etc/systemd/$place/qubes-waiting.target.d
        printf '[Unit]\nBefore=default.target\n' \
            >/etc/systemd/$place/qubes-waiting.target.d/read-units.conf
    fi
done
of_vm() {
    grep -EhsR --exclude=systemd.conf --exclude=systemd-tmp.conf \
        --exclude=journal-nocow.conf "$1" /etc/tmpfiles.d /usr/lib/tmpfiles.d
}
if ! of_vm '%[bHlmq]' && ! of_vm '^[^#]*[[:space:]]"?/(home|rw|usr/local)/' &&
    ! of_vm '^ *(F|w|[fCpcb]\\+)[^[:space:]]*[[:space:]]+"?/([^r]|r[^u])'; then
    printf '[Unit]\nWants=qubes-tmpfiles.service\n' >"$waiting/make-files.conf"
fi
logind=/etc/systemd/system/systemd-logind.service.d/later.conf
session=/etc/systemd/system/user@1000.service.d
rm -f "$logind" "$session/later.conf" "$session/waiting.conf"
mkdir -p "$session"
if grep -qs systemd-logind /usr/lib/systemd/system/user@.service; then
    printf '[Unit]\nAfter=qubes-qrexec-agent.service basic.target\n' \\
        >"$session/later.conf"
else
    mkdir -p "${logind%/*}"
    printf '[Unit]\nAfter=qubes-session.socket\n' >"$logind"
    printf '[Unit]\nWants=user@1000.service\n' >"$waiting/session.conf"
    cat >"$session/waiting.conf" <<END
[Unit]
Before=qubes-qrexec-agent.service
[Service]
ExecStart=
ExecStart=/usr/lib/qubes/agent user-manager
END
fi
touch -r /usr /etc/.updated /var/.updated
"""
