/* Disks are known by their serial numbers: /dev/xvda leads to the disk called xvda. */
#include "agent.h"

#include <dirent.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static struct watch uevents = {.fd = -1};

/* The name that a disk's serial number asks for: "xvd" and one letter. */
static bool disk_name(const char *disk, char name[5])
{
	char path[PATH_LIMIT], page[64];
	const char *serial = page;
	ssize_t length;

	snprintf(path, sizeof path, "/sys/block/%s/serial", disk);
	length = read_file(path, page, sizeof page);
	if (length <= 0) { /* SCSI: page 0x80, four bytes of header */
		snprintf(path, sizeof path, "/sys/block/%s/device/vpd_pg80", disk);
		length = read_file(path, page, sizeof page) - 4;
		serial += 4;
	}
	while (length > 4 && serial[length - 1] == ' ')
		length--;
	if (length != 4 || memcmp(serial, "xvd", 3) != 0 || serial[3] < 'a' ||
	    serial[3] > 'z')
		return false;
	snprintf(name, 5, "%.4s", serial);
	return true;
}

static void link_disk(const char *disk)
{
	char name[5], path[16], target[NAME_LIMIT] = "";

	if (!disk_name(disk, name))
		return;
	snprintf(path, sizeof path, "/dev/%s", name);
	if (readlink(path, target, sizeof target - 1) > 0 && strcmp(target, disk) == 0)
		return;
	unlink(path);
	if (symlink(disk, path) != 0)
		send_text(LOG, "%s cannot be made", path);
}

static void drop_stale_links(void)
{
	char path[] = "/dev/xvd?";

	for (path[8] = 'a'; path[8] <= 'z'; path[8]++)
		if (access(path, F_OK) != 0)
			unlink(path);
}

void disks_scan(void)
{
	DIR *directory = opendir("/sys/block");
	const struct dirent *entry;

	drop_stale_links();
	while (directory && (entry = readdir(directory)))
		if (entry->d_name[0] != '.')
			link_disk(entry->d_name);
	if (directory)
		closedir(directory);
}

static void uevent_ready(struct watch *watch, uint32_t events)
{
	char message[8192];

	(void)events;
	/* What happened does not matter: the scan sees it, lost messages included. */
	while (recv(watch->fd, message, sizeof message, MSG_DONTWAIT) >= 0)
		;
	disks_scan();
}

bool disks_wait(int timeout_ms)
{
	struct pollfd waited = {.fd = uevents.fd, .events = POLLIN};

	if (poll(&waited, 1, timeout_ms) <= 0)
		return false;
	uevent_ready(&uevents, 0);
	return true;
}

void disks_open(void)
{
	struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
	int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
	                NETLINK_KOBJECT_UEVENT);

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0)
		die("uevents");
	watch_open(&uevents, fd, EPOLLIN, uevent_ready);
}
