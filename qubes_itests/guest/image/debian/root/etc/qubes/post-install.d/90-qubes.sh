#!/bin/sh
# Tell dom0 what is installed here. The scripts before have noted what they ask for.
. /etc/os-release
qvm-features-request --commit os=Linux os-distribution="$ID" os-version="${VERSION_ID-}" \
    qrexec=1 vmexec=1
