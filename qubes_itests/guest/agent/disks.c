/* Disks are known by their serial numbers: /dev/xvda leads to the disk called xvda. */
#include "agent.h"

#include <linux/fs.h>
#include <linux/netlink.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <time.h>

static int uevents = -1;

/* The letter in the name that a disk's serial number asks for: "xvd" and one; or NUL. */
static char letter_of(const char *disk)
{
	char path[PATH_LIMIT], page[64], letter[2] = "";
	const char *serial = page;
	int end = 0;

	snprintf(path, sizeof path, "/sys/block/%s/serial", disk);
	if (read_file(in_root(path), page, sizeof page) < 0) {
		/* SCSI: page 0x80, whose header is four bytes. */
		snprintf(path, sizeof path, "/sys/block/%s/device/vpd_pg80", disk);
		serial += read_file(in_root(path), page, sizeof page) > 4 ? 4 : 0;
	}
	if (sscanf(serial, "xvd%1[a-z] %n", letter, &end) != 1 || serial[end] != '\0')
		return '\0';
	return *letter;
}

bool disk_is_ours(const char *disk)
{
	return letter_of(disk) != '\0';
}

static void link_disk(const char *disk)
{
	char target[NAME_LIMIT] = "", name[] = "/dev/xvd?";

	name[8] = letter_of(disk);
	if (!name[8] ||
	    (readlink(name, target, sizeof target - 1) > 0 && strcmp(target, disk) == 0))
		return;
	unlink(name);
	if (symlink(disk, name) != 0)
		send_text(LOG, "%s cannot be made", name);
}

static void scan(void)
{
	DIR *directory = opendir("/sys/block");
	const struct dirent *entry;
	char name[] = "/dev/xvda";

	for (; name[8] <= 'z'; name[8]++)
		if (access(name, F_OK) != 0)
			unlink(name);
	while (directory && (entry = readdir(directory)))
		if (entry->d_name[0] != '.')
			link_disk(entry->d_name);
	if (directory)
		closedir(directory);
}

void disks_ready(void)
{
	char message[8192];

	/* What happened does not matter: the scan sees it, lost messages included. */
	while (recv(uevents, message, sizeof message, MSG_DONTWAIT) >= 0)
		;
	scan();
}

void disks_settle(void)
{
	struct pollfd changes[] = {{.fd = uevents, .events = POLLIN},
	                           {.fd = blocks_mounts(), .events = POLLPRI}};

	if (poll(changes, 2, 0) <= 0 && !testing)
		return;
	if (changes[0].revents)
		disks_ready();
	blocks_update();
}

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Whether a disk can be opened: it has its name a moment earlier. */
bool disk_wait(const char *path, int milliseconds)
{
	struct pollfd change = {.fd = uevents, .events = POLLIN};
	long long end = now_ms() + milliseconds;
	int fd;

	while ((fd = open(path, O_RDONLY | O_CLOEXEC)) < 0 && now_ms() < end) {
		poll(&change, 1, 20);
		disks_ready();
	}
	if (fd >= 0)
		close(fd);
	return fd >= 0;
}

/* The kernel learns of a disk's new size in its own time, unless it is asked for it. */
uint64_t disk_size(int fd)
{
	struct stat status;
	uint64_t size = 0;
	char path[64];
	int file;

	if (fstat(fd, &status) == 0) {
		snprintf(path, sizeof path, "/sys/dev/block/%u:%u/device/rescan",
		         major(status.st_rdev), minor(status.st_rdev));
		file = open(path, O_WRONLY | O_CLOEXEC);
		if (file >= 0 && write(file, "1", 1) != 1)
			send_text(LOG, "%s: %s", path, strerror(errno));
		if (file >= 0)
			close(file);
	}
	return ioctl(fd, BLKGETSIZE64, &size) == 0 ? size : 0;
}

/* Whether it is "there", is "gone", or has at least so many bytes; looked up now,
 * whatever has been told of it. */
const char *disk_check(const char *name, const char *state)
{
	bool gone = strcmp(state, "gone") == 0, there = strcmp(state, "there") == 0;
	char path[16], *end;
	uint64_t size = strtoull(state, &end, 10);
	struct stat status;
	int fd;

	if (strlen(name) != 4 || strncmp(name, "xvd", 3) != 0 ||
	    (!gone && !there && (*end || !*state)))
		return "no question about a disk";
	if (!testing)
		disks_ready();
	snprintf(path, sizeof path, "/dev/%s", name);
	/* A plain file that somebody has written there is no disk. */
	fd = stat(in_root(path), &status) == 0 && (S_ISBLK(status.st_mode) || testing)
	     ? open(in_root(path), O_RDONLY | O_CLOEXEC | O_NONBLOCK) : -1;
	if (fd < 0)
		return gone ? NULL : "the disk is not there";
	if (!gone && !there)
		there = disk_size(fd) >= size;
	close(fd);
	if (there)
		return NULL;
	return gone ? "the disk is still there" : "the disk is smaller";
}

int disks_open(void)
{
	struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};

	uevents = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
	                 NETLINK_KOBJECT_UEVENT);
	if (uevents < 0 || bind(uevents, (struct sockaddr *)&address, sizeof address) != 0)
		die("uevents");
	return uevents;
}
