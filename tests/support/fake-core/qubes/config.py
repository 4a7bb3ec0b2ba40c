"""Where a core looks programs up."""

system_path = {
    "qrexec_daemon_path": "/usr/sbin/qrexec-daemon",
    "qrexec_client_path": "/usr/bin/qrexec-client",
    "qubesdb_daemon_path": "/usr/sbin/qubesdb-daemon",
}
qmemman_avail_mem_file = "/var/run/qubes/qmemman-avail-mem"

defaults = {"private_img_size": 2 << 30, "root_img_size": 10 << 30}
