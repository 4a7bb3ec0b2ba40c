/* Stage two: the VM gets its identity, and its root becomes ours. */
#include "agent.h"

#include <ftw.h>
#include <linux/fs.h>
#include <linux/random.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/swap.h>
#include <time.h>

#define NEW_ROOT "/sysroot"
#define SWAP_MAX ((uint64_t)64 << 30)
#define EXT4_RESIZE _IOW('f', 16, uint64_t)

enum { DEADLINE = 10000 /* milliseconds */ };

/* What went wrong, for FAILED. */
static char problem[TEXT_MAX];

static bool failed(const char *what)
{
	snprintf(problem, sizeof problem, "%s: %s", what, strerror(errno));
	return false;
}

static bool refused(const char *what)
{
	snprintf(problem, sizeof problem, "%s", what);
	return false;
}

/* The value of a key of ENTER, or NULL. */
static const char *value_of(struct strings identity, const char *key)
{
	size_t length = strlen(key);
	const char *entry;

	while ((entry = next_string(&identity)))
		if (strncmp(entry, key, length) == 0 && entry[length] == '=')
			return entry + length + 1;
	return NULL;
}

static bool set_seed(const char *hex)
{
	union {
		struct rand_pool_info info;
		uint8_t space[sizeof(struct rand_pool_info) + 64];
	} pool = {.info = {.entropy_count = 512, .buf_size = 64}};
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
	bool done;

	for (int i = 0; i < 64; i++)
		if (strlen(hex) != 128 ||
		    sscanf(hex + 2 * i, "%2hhx", (uint8_t *)pool.info.buf + i) != 1)
			return refused("a bad seed");
	done = ioctl(fd, RNDADDENTROPY, &pool) == 0 && ioctl(fd, RNDRESEEDCRNG) == 0;
	close(fd);
	return done || failed("the random pool");
}

const char *set_clock(uint64_t nanoseconds)
{
	struct timespec now = {.tv_sec = (time_t)(nanoseconds / 1000000000u),
	                       .tv_nsec = (long)(nanoseconds % 1000000000u)};

	if (testing)
		return "this clock is the host's";
	return clock_settime(CLOCK_REALTIME, &now) == 0 || failed("the clock") ? NULL : problem;
}

static const char *device(const char *disk)
{
	static char path[32];

	snprintf(path, sizeof path, "/dev/%.16s", disk);
	return path;
}

static bool wait_for_disks(struct strings identity)
{
	static const char *const keys[] = {"root", "private", "volatile"};
	const char *deadline = value_of(identity, "deadline"), *disk;

	for (size_t i = 0; i < 3; i++) {
		disk = value_of(identity, keys[i]);
		if (disk && !disk_wait(device(disk), deadline ? 1000 * atoi(deadline) : DEADLINE)) {
			snprintf(problem, sizeof problem, "no disk %.16s", disk);
			return false;
		}
	}
	return true;
}

/* The filesystem grows to its disk, as the volume may have been resized. */
static void grow(const char *disk, const char *path)
{
	uint32_t super[8] = {0}; /* blocks in word 1, their size in word 6 */
	uint64_t size = 0, blocks;
	int fd = open(device(disk), O_RDONLY | O_CLOEXEC);
	int mounted = open(path, O_RDONLY | O_CLOEXEC);

	ioctl(fd, BLKGETSIZE64, &size);
	if (pread(fd, super, sizeof super, 1024) == sizeof super) {
		blocks = size >> (10 + (super[6] & 7));
		if (blocks > super[1] && ioctl(mounted, EXT4_RESIZE, &blocks) != 0)
			send_text(LOG, "%s does not grow: %s", path, strerror(errno));
	}
	close(fd);
	close(mounted);
}

static bool mount_disk(const char *disk, const char *path, unsigned long flags)
{
	if (mount(device(disk), path, "ext4", flags, "") != 0)
		return failed(device(disk));
	if (!(flags & MS_RDONLY))
		grow(disk, path);
	return true;
}

/* Gives the memory of the initramfs back. */
static int remove_one(const char *path, const struct stat *status, int type,
                      struct FTW *place)
{
	(void)status;
	(void)type;
	(void)place;
	remove(path);
	return 0;
}

static bool switch_root(const char *disk, bool read_only)
{
	static const char *const moved[] = {"/dev", "/proc", "/sys", "/run"};
	char path[64];
	struct stat status;

	mkdir(NEW_ROOT, 0755);
	if (!mount_disk(disk, NEW_ROOT, read_only ? MS_RDONLY : 0))
		return false;
	/* Looked at first, moved then: a failure must leave stage one whole. */
	for (size_t i = 0; i < 8; i++) {
		snprintf(path, sizeof path, NEW_ROOT "%s", moved[i % 4]);
		if (i < 4 ? stat(path, &status) == 0
		          : mount(moved[i % 4], path, NULL, MS_MOVE, NULL) == 0)
			continue;
		failed(path);
		umount2(NEW_ROOT, MNT_DETACH);
		return false;
	}
	nftw("/", remove_one, 16, FTW_DEPTH | FTW_MOUNT | FTW_PHYS);
	if (chdir(NEW_ROOT) != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 ||
	    chroot(".") != 0 || chdir("/") != 0)
		return failed("the new root");
	return true;
}

static void make_homes(void)
{
	FILE *file = fopen("/etc/passwd", "re");
	const struct passwd *user;
	char path[PATH_LIMIT];

	while (file && (user = fgetpwent(file))) {
		snprintf(path, sizeof path, "/rw%s", user->pw_dir);
		if (strncmp(path, "/rw/home/", 9) == 0 && mkdir(path, 0700) == 0 &&
		    chown(path, user->pw_uid, user->pw_gid) != 0)
			send_text(LOG, "%s: %s", path, strerror(errno));
	}
	if (file)
		fclose(file);
}

static bool mount_private(const char *disk)
{
	if (!mount_disk(disk, "/rw", MS_NOSUID | MS_NODEV))
		return false;
	mkdir("/rw/config", 0755);
	mkdir("/rw/home", 0755);
	mkdir("/rw/usrlocal", 0755);
	make_homes();
	return (mount("/rw/home", "/home", NULL, MS_BIND, NULL) == 0 &&
	        mount("/rw/usrlocal", "/usr/local", NULL, MS_BIND, NULL) == 0) ||
	       failed("/rw");
}

/* A swap area of version 1 that covers the disk, or as much of it as is of use: the
 * kernel needs memory for every page that it could swap out. */
static bool swap_on(const char *disk)
{
	uint64_t size = 0;
	uint32_t header[3] = {1, 0, 0}; /* version, last page, bad pages */
	int fd = open(device(disk), O_RDWR | O_CLOEXEC);
	bool done = ioctl(fd, BLKGETSIZE64, &size) == 0;

	if (size > SWAP_MAX)
		size = SWAP_MAX;
	header[1] = (uint32_t)(size / 4096 - 1);
	done = done && pwrite(fd, header, sizeof header, 1024) == sizeof header &&
	       pwrite(fd, "SWAPSPACE2", 10, 4086) == 10 && swapon(device(disk), 0) == 0;
	close(fd);
	return done || failed(device(disk));
}

static void mount_rest(void)
{
	static const char *const links[][2] = {
		{"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"},
		{"/proc/self/fd/1", "/dev/stdout"}, {"/proc/self/fd/2", "/dev/stderr"}};

	mount_kernel("devpts", "/dev/pts", "mode=620,ptmxmode=666");
	mount_kernel("tmpfs", "/dev/shm", "mode=1777");
	mount_kernel("tmpfs", "/tmp", "mode=1777");
	for (size_t i = 0; i < sizeof links / sizeof *links; i++)
		if (symlink(links[i][0], links[i][1]) != 0)
			send_text(LOG, "%s: %s", links[i][1], strerror(errno));
}

static void loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (ioctl(fd, SIOCSIFFLAGS, &request) != 0)
		send_text(LOG, "loopback: %s", strerror(errno));
	close(fd);
}

static void make_service(const char *name, size_t length)
{
	char path[PATH_LIMIT];

	if (length == 0 || length >= NAME_LIMIT || *name == '.' || memchr(name, '/', length))
		return;
	snprintf(path, sizeof path, "/run/qubes-service/%.*s", (int)length, name);
	close(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644));
}

static bool set_entries(struct strings identity)
{
	const char *name = value_of(identity, "name"), *entry;
	char path[NAME_LIMIT];

	mkdir("/run/qubes-service", 0755);
	if (!db_set("/name", name) || sethostname(name, strlen(name)) != 0)
		return failed("the name");
	while ((entry = next_string(&identity))) {
		const char *value = strchrnul(entry, '=');

		if (strncmp(entry, "service:", 8) == 0)
			make_service(entry + 8, (size_t)(value - entry - 8));
		if (strncmp(entry, "db:", 3) != 0)
			continue;
		snprintf(path, sizeof path, "%.*s", (int)(value - entry - 3), entry + 3);
		if (*value == '\0' || !db_set(path, value + 1))
			return refused("the database takes no such entry");
	}
	return true;
}

static bool write_user(void)
{
	int fd = open(USER_PATH, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	ssize_t length = (ssize_t)strlen(default_user);
	bool written = write(fd, default_user, (size_t)length) == length;

	close(fd);
	return written || failed(USER_PATH);
}

/* The root's own init becomes process 1, and starts us anew when it is ready. */
static bool hand_over(void)
{
	static char *const argv[] = {(char *)(uintptr_t)"/sbin/init", NULL};
	struct sched_param parameter = {0};
	sigset_t none;

	if (!write_user())
		return false;
	/* The new init inherits our children and knows none of them. The port's descriptor is
	 * closed on exec; what is still to be sent would be lost with our memory. */
	streams_reset();
	listeners_end();
	port_flush();
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	sched_setscheduler(0, SCHED_OTHER, &parameter);
	execv(argv[0], argv);
	return failed(argv[0]);
}

const char *enter(struct strings identity)
{
	static bool entered;
	const char *seed = value_of(identity, "seed"), *now = value_of(identity, "time"),
	           *private = value_of(identity, "private"),
	           *swap = value_of(identity, "volatile"),
	           *user = value_of(identity, "default-user"),
	           *mode = value_of(identity, "root-mode"),
	           *init = value_of(identity, "init"),
	           *root = value_of(identity, "root");

	if (entered)
		return "there is no stage two but one";
	if (!value_of(identity, "name") || !root)
		return "name and root are needed";
	if (init && strcmp(init, "agent") != 0 && strcmp(init, "systemd") != 0)
		return "init is agent or systemd";
	if ((seed && !set_seed(seed)) || (now && set_clock(strtoull(now, NULL, 10))) ||
	    !wait_for_disks(identity) ||
	    !switch_root(root, mode && strcmp(mode, "ro") == 0))
		return problem;
	entered = true;
	if (user)
		snprintf(default_user, sizeof default_user, "%s", user);
	mount_rest();
	loopback_up();
	if ((private && !mount_private(private)) || !set_entries(identity) ||
	    (swap && !swap_on(swap)))
		return problem;
	if (init && strcmp(init, "systemd") == 0)
		return hand_over() ? NULL : problem;
	make_runtime();
	return NULL;
}
