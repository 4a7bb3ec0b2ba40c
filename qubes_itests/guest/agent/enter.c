/* Stage two: the VM gets its identity, and its root becomes ours. */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/random.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <time.h>
#include <unistd.h>

#define NEW_ROOT "/sysroot"
#define EXT4_RESIZE _IOW('f', 16, uint64_t)

struct identity {
	const char *name, *time, *seed, *root, *private_disk, *volatile_disk, *root_mode,
		*user, *deadline;
	struct strings all;
};

/* What went wrong, for FAILED; with errno when it is not 0. */
static char problem[TEXT_MAX];

static bool failed(const char *what, int error)
{
	snprintf(problem, sizeof problem, "%s%s%s", what, error ? ": " : "",
	         error ? strerror(error) : "");
	return false;
}

static bool parse(struct strings request, struct identity *identity)
{
	const struct {
		const char *key;
		const char **value;
	} keys[] = {
		{"name=", &identity->name}, {"time=", &identity->time},
		{"seed=", &identity->seed}, {"root=", &identity->root},
		{"private=", &identity->private_disk},
		{"volatile=", &identity->volatile_disk},
		{"root-mode=", &identity->root_mode}, {"default-user=", &identity->user},
		{"deadline=", &identity->deadline},
	};
	const char *entry;

	identity->all = request;
	while ((entry = next_string(&request))) {
		size_t i = 0, count = sizeof keys / sizeof *keys;

		if (strncmp(entry, "db:", 3) == 0 || strncmp(entry, "service:", 8) == 0)
			continue;
		while (i < count && strncmp(entry, keys[i].key, strlen(keys[i].key)) != 0)
			i++;
		if (i == count || *keys[i].value)
			return failed(i == count ? "an unknown key" : "a key is there twice", 0);
		*keys[i].value = entry + strlen(keys[i].key);
	}
	if (!identity->name || !identity->root || strchr(identity->name, '/'))
		return failed("name and root are needed", 0);
	return true;
}

static bool set_seed(const char *hex)
{
	union {
		struct rand_pool_info info;
		uint8_t space[sizeof(struct rand_pool_info) + 64];
	} pool = {.info = {.entropy_count = 512, .buf_size = 64}};
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
	bool done;

	for (size_t i = 0; i < 64; i++) {
		unsigned int byte;

		if (strlen(hex) != 128 || sscanf(hex + 2 * i, "%2x", &byte) != 1)
			return failed("a bad seed", 0);
		((uint8_t *)pool.info.buf)[i] = (uint8_t)byte;
	}
	done = fd >= 0 && ioctl(fd, RNDADDENTROPY, &pool) == 0 && ioctl(fd, RNDRESEEDCRNG) == 0;
	if (!done)
		failed("the random pool", errno);
	if (fd >= 0)
		close(fd);
	return done;
}

static bool set_clock(const char *nanoseconds)
{
	unsigned long long value = strtoull(nanoseconds, NULL, 10);
	struct timespec now = {.tv_sec = (time_t)(value / 1000000000u),
	                       .tv_nsec = (long)(value % 1000000000u)};

	return clock_settime(CLOCK_REALTIME, &now) == 0 || failed("the clock", errno);
}

static void loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) != 0)
		send_text(LOG, "loopback: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
}

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static const char *device_path(const char *disk)
{
	static char path[32];

	snprintf(path, sizeof path, "/dev/%.16s", disk);
	return path;
}

/* A disk has its name a moment before it can be opened. */
static bool usable(const char *disk)
{
	int fd = open(device_path(disk), O_RDONLY | O_CLOEXEC);

	if (fd >= 0)
		close(fd);
	return fd >= 0;
}

static bool wait_for_disks(const struct identity *identity)
{
	const char *disks[3] = {identity->root, identity->private_disk,
	                        identity->volatile_disk};
	double end = seconds() + (identity->deadline ? strtod(identity->deadline, NULL) : 10);
	char text[64];

	disks_scan();
	for (int i = 0; i < 3; i++)
		while (disks[i] && !usable(disks[i])) {
			double left = end - seconds();

			if (left <= 0) {
				snprintf(text, sizeof text, "no disk %.16s", disks[i]);
				return failed(text, ETIMEDOUT);
			}
			if (!disks_wait(left < 0.1 ? 10 : 100))
				disks_scan();
		}
	return true;
}

static bool mount_disk(const char *disk, const char *path, unsigned long flags)
{
	return mount(device_path(disk), path, "ext4", flags, "") == 0 ||
	       failed(device_path(disk), errno);
}

/* The filesystem grows to its disk, as the volume may have been resized. */
static void grow(const char *disk, const char *path)
{
	uint32_t super[8] = {0}; /* blocks in word 1, their size in word 6 */
	uint64_t size = 0, blocks;
	int fd = open(device_path(disk), O_RDONLY | O_CLOEXEC);
	int mounted = open(path, O_RDONLY | O_CLOEXEC);

	if (fd >= 0 && mounted >= 0 && ioctl(fd, BLKGETSIZE64, &size) == 0 &&
	    pread(fd, super, sizeof super, 1024) == sizeof super) {
		blocks = size >> (10 + (super[6] & 7));
		if (blocks > super[1] && ioctl(mounted, EXT4_RESIZE, &blocks) != 0)
			send_text(LOG, "%s does not grow: %s", path, strerror(errno));
	}
	if (fd >= 0)
		close(fd);
	if (mounted >= 0)
		close(mounted);
}

static void own_directory(const char *path, const struct user *user, mode_t mode)
{
	if (mkdir(path, mode) == 0 && user && chown(path, user->uid, user->gid) != 0)
		send_text(LOG, "%s: %s", path, strerror(errno));
}

static bool bind_mount(const char *from, const char *to)
{
	return mount(from, to, NULL, MS_BIND, NULL) == 0 || failed(to, errno);
}

static bool mount_private(const char *disk)
{
	struct user user;

	if (!mount_disk(disk, NEW_ROOT "/rw", MS_NOSUID | MS_NODEV))
		return false;
	grow(disk, NEW_ROOT "/rw");
	root_prefix = NEW_ROOT;
	own_directory(NEW_ROOT "/rw/config", NULL, 0755);
	own_directory(NEW_ROOT "/rw/home", NULL, 0755);
	own_directory(NEW_ROOT "/rw/usrlocal", NULL, 0755);
	for (int i = 0; i < 2; i++) {
		char path[PATH_LIMIT + 32];

		if (!find_user(i ? "user" : default_user, 0, &user) ||
		    strncmp(user.home, "/home/", 6) != 0)
			continue;
		snprintf(path, sizeof path, NEW_ROOT "/rw%s", user.home);
		own_directory(path, &user, 0700);
	}
	root_prefix = "";
	return bind_mount(NEW_ROOT "/rw/home", NEW_ROOT "/home") &&
	       bind_mount(NEW_ROOT "/rw/usrlocal", NEW_ROOT "/usr/local");
}

/* A swap area of version 1 that covers the disk. */
static bool swap_on(const char *disk)
{
	struct {
		char boot[1024];
		uint32_t version, last_page, bad_pages;
		char rest[4096 - 1024 - 12 - 10], magic[10];
	} header = {.version = 1};
	uint64_t size = 0;
	int fd = open(device_path(disk), O_RDWR | O_CLOEXEC);
	bool done;

	_Static_assert(sizeof header == 4096, "one page");
	memcpy(header.magic, "SWAPSPACE2", 10);
	done = fd >= 0 && ioctl(fd, BLKGETSIZE64, &size) == 0;
	header.last_page = (uint32_t)(size / 4096 - 1);
	done = done && write(fd, &header, sizeof header) == sizeof header;
	if (!done || swapon(device_path(disk), 0) != 0)
		failed(device_path(disk), errno);
	if (fd >= 0)
		close(fd);
	return *problem == '\0';
}

/* Give the memory of the initramfs back; it is the filesystem of `device`. */
static void remove_tree(int parent, const char *name, dev_t device)
{
	int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	DIR *directory = fd < 0 ? NULL : fdopendir(fd);
	const struct dirent *entry;
	struct stat status;

	while (directory && fstat(fd, &status) == 0 && status.st_dev == device &&
	       (entry = readdir(directory))) {
		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
			continue;
		if (unlinkat(fd, entry->d_name, 0) == 0)
			continue;
		remove_tree(fd, entry->d_name, device);
		unlinkat(fd, entry->d_name, AT_REMOVEDIR);
	}
	if (directory)
		closedir(directory);
}

static bool mount_root(const struct identity *identity)
{
	bool read_only = identity->root_mode && strcmp(identity->root_mode, "ro") == 0;

	mkdir(NEW_ROOT, 0755);
	if (!mount_disk(identity->root, NEW_ROOT, read_only ? MS_RDONLY : 0))
		return false;
	if (!read_only)
		grow(identity->root, NEW_ROOT);
	return !identity->private_disk || mount_private(identity->private_disk);
}

static void unmount_root(void)
{
	umount2(NEW_ROOT "/usr/local", MNT_DETACH);
	umount2(NEW_ROOT "/home", MNT_DETACH);
	umount2(NEW_ROOT "/rw", MNT_DETACH);
	umount2(NEW_ROOT, MNT_DETACH);
}

static bool switch_root(void)
{
	static const char *const moved[] = {"/dev", "/proc", "/sys", "/run"};
	char path[64];
	struct stat status;

	/* Looked at first, moved then: a failure must leave stage one whole. */
	for (size_t i = 0; i < 8; i++) {
		snprintf(path, sizeof path, NEW_ROOT "%s", moved[i % 4]);
		if (i < 4 ? stat(path, &status) != 0
		          : mount(moved[i % 4], path, NULL, MS_MOVE, NULL) != 0)
			return failed(path, errno);
	}
	if (stat("/", &status) == 0)
		remove_tree(AT_FDCWD, "/", status.st_dev);
	if (chdir(NEW_ROOT) != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 ||
	    chroot(".") != 0 || chdir("/") != 0)
		return failed("the new root", errno);
	return true;
}

static void mount_rest(void)
{
	mkdir("/dev/pts", 0755);
	mkdir("/dev/shm", 01777);
	mount("devpts", "/dev/pts", "devpts", MS_NOSUID, "mode=620,ptmxmode=666");
	mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
	mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
	if (symlink("/proc/self/fd", "/dev/fd") == 0) {
		symlink("/proc/self/fd/0", "/dev/stdin");
		symlink("/proc/self/fd/1", "/dev/stdout");
		symlink("/proc/self/fd/2", "/dev/stderr");
	}
}

static void make_service(const char *name, size_t length)
{
	char path[PATH_LIMIT];
	int fd;

	if (length == 0 || length >= NAME_LIMIT || *name == '.' || memchr(name, '/', length))
		return;
	snprintf(path, sizeof path, "/run/qubes-service/%.*s", (int)length, name);
	fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	if (fd >= 0)
		close(fd);
}

static bool set_entries(const struct identity *identity)
{
	struct strings all = identity->all;
	const char *entry;
	char path[NAME_LIMIT];

	mkdir("/run/qubes-service", 0755);
	if (!db_set("/name", identity->name))
		return failed("the database", 0);
	while ((entry = next_string(&all))) {
		const char *value = strchr(entry, '=');

		if (strncmp(entry, "service:", 8) == 0)
			make_service(entry + 8, strcspn(entry + 8, "="));
		if (strncmp(entry, "db:", 3) != 0)
			continue;
		snprintf(path, sizeof path, "%.*s", (int)(value - entry - 3), entry + 3);
		if (!db_set(path, value + 1))
			return failed("the database takes no such entry, or is full", 0);
	}
	return db_publish() || failed(DB_PATH, errno);
}

static bool entries_valid(struct strings all)
{
	const char *entry;

	while ((entry = next_string(&all)))
		if (!strchr(entry, '='))
			return failed("an entry without =", 0);
	return true;
}

void enter(struct strings request)
{
	struct identity identity = {0};
	static bool entered;

	*problem = '\0';
	if (testing || entered) {
		send_text(FAILED, "there is no stage two %s", testing ? "here" : "but one");
		return;
	}
	if (!entries_valid(request) || !parse(request, &identity) ||
	    (identity.seed && !set_seed(identity.seed)) ||
	    (identity.time && !set_clock(identity.time)) || !wait_for_disks(&identity)) {
		send_text(FAILED, "%s", problem);
		return;
	}
	if (identity.user)
		snprintf(default_user, sizeof default_user, "%s", identity.user);
	if (!mount_root(&identity) || !switch_root()) {
		unmount_root();
		send_text(FAILED, "%s", problem);
		return;
	}
	entered = true;
	mount_rest();
	loopback_up();
	if (sethostname(identity.name, strlen(identity.name)) != 0)
		failed("the host name", errno);
	if (!set_entries(&identity) ||
	    (identity.volatile_disk && !swap_on(identity.volatile_disk)))
		send_text(FAILED, "%s", problem);
	else
		send_frame(DONE, 0, 0, NULL, 0);
}
