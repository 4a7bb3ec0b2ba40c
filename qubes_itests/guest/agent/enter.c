/* Stage two: the VM gets its identity, and its root becomes ours. */
#include "agent.h"

#include <ftw.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <linux/random.h>
#include <net/if.h>
#include <sched.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/un.h>
#include <time.h>

#define NEW_ROOT "/sysroot"
#define SWAP_MAX ((uint64_t)64 << 30)
#define EXT4_RESIZE _IOW('f', 16, uint64_t)

enum { DEADLINE = 10000, PAUSE = 2 /* milliseconds */ };
/* Of the units that a session begins with, as systemd has it for one that does not wait. */
enum { SESSION_DEADLINE = 90 /* seconds */ };

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

/* What was mounted or looked at in a saved state may have been another disk in part: with
 * another size, or not to be written. */
static void look_again(const char *disk)
{
	int fd = open(device(disk), O_RDONLY | O_CLOEXEC);

	disk_size(fd);
	close(fd);
}

static bool wait_for_disks(struct strings identity, bool saved)
{
	static const char *const keys[] = {"root", "private", "volatile"};
	const char *deadline = value_of(identity, "deadline"),
	           *unchanged = value_of(identity, "unchanged"), *disk;

	for (size_t i = 0; i < 3; i++) {
		disk = value_of(identity, keys[i]);
		if (disk && !disk_wait(device(disk), deadline ? 1000 * atoi(deadline) : DEADLINE)) {
			snprintf(problem, sizeof problem, "no disk %.16s", disk);
			return false;
		}
		if (disk && saved && !(unchanged && strstr(unchanged, disk)))
			look_again(disk);
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

/* What was mounted read-only, so that a saved state of it fits any copy of the disk. */
static bool make_writable(const char *disk)
{
	/* What only has been read, all that starts here, is not worth a write. */
	if (mount(NULL, "/", NULL, MS_REMOUNT | MS_LAZYTIME, "") != 0)
		return failed(device(disk));
	grow(disk, "/");
	return true;
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
	struct stat status;
	char path[PATH_LIMIT];

	while (file && (user = fgetpwent(file))) {
		snprintf(path, sizeof path, "/rw%s", user->pw_dir);
		if (strncmp(path, "/rw/home/", 9) != 0)
			continue;
		mkdir(path, 0700);
		/* Root's is what was made now, or by the host, which does not know the users. */
		if (lstat(path, &status) == 0 && S_ISDIR(status.st_mode) && status.st_uid == 0 &&
		    is_empty(path) && chown(path, user->pw_uid, user->pw_gid) != 0)
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

#define BOOT_ID "/proc/sys/kernel/random/boot_id"
#define DIRECTORY "/run/qubes"
#define FIRST_BOOT_ID DIRECTORY "/first-boot-id"
/* There until the guest has its identity. */
#define WAITING DIRECTORY "/waiting"

/* As systemd-user-runtime-dir would, which takes longer to start than all of this, and
 * asks logind. */
bool make_runtime_directory(const struct passwd *user)
{
	struct sysinfo system = {.mem_unit = 1};
	struct stat parent, status;
	char path[64], options[128];
	unsigned long long size;

	sysinfo(&system);
	size = (unsigned long long)system.totalram * system.mem_unit / 10;
	snprintf(path, sizeof path, "/run/user/%u", user->pw_uid);
	snprintf(options, sizeof options, "mode=0700,uid=%u,gid=%u,size=%llu,nr_inodes=%llu",
	         user->pw_uid, user->pw_gid, size, size / 4096);
	mkdir("/run/user", 0755);
	mkdir(path, 0700);
	if (stat("/run/user", &parent) == 0 && stat(path, &status) == 0 &&
	    status.st_dev != parent.st_dev)
		return true;
	return mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options) == 0;
}

/* Not truncated first, or ext4 would find room for the new contents and write them to the
 * disk at once, which takes an emulated guest half as long as to mount one. */
static bool write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0444);
	ssize_t length = (ssize_t)strlen(text);
	struct stat status = {.st_size = 0};
	bool written = write(fd, text, (size_t)length) == length &&
	               fstat(fd, &status) == 0 &&
	               (status.st_size == length || ftruncate(fd, length) == 0);

	close(fd);
	return written;
}

/* In place of the one that systemd has made up while it waited, and bound over the file;
 * in a root that cannot be written ours is bound over it as well. */
static bool set_machine_id(const char *id)
{
	static const char path[] = "/etc/machine-id", volatile_path[] = "/run/machine-id";
	char line[NAME_LIMIT];

	snprintf(line, sizeof line, "%.200s\n", id);
	umount2(path, MNT_DETACH);
	unlink(volatile_path);
	return access(path, F_OK) != 0 || write_file(path, line) ||
	       (write_file(volatile_path, line) &&
	        mount(volatile_path, path, NULL, MS_BIND, NULL) == 0) ||
	       failed(path);
}

/* The kernel makes its boot ID up when it is first read. That shall be later, where VMs
 * start from a state of this. */
static bool hide_boot_id(void)
{
	char id[64];

	read_file("/proc/sys/kernel/random/uuid", id, sizeof id);
	return (write_file(FIRST_BOOT_ID, id) &&
	        mount(FIRST_BOOT_ID, BOOT_ID, NULL, MS_BIND, NULL) == 0) ||
	       failed(BOOT_ID);
}

/* The root's own init becomes process 1. It starts what needs no identity, us among that,
 * and waits. What is known of that already it finds when it starts: no state is saved. */
static bool hand_over(const char *host, const char *machine)
{
	static char *const argv[] = {(char *)(uintptr_t)"/sbin/init",
	                             (char *)(uintptr_t)"--unit=qubes-waiting.target", NULL};
	struct sched_param parameter = {0};
	sigset_t none;

	/* The filesystem stays read-only, the mount does not: services have copies of that
	 * which nobody could make writable later. */
	if (mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL) != 0 ||
	    /* without one systemd notes that its is one of its own making */
	    sethostname(host ? host : "localhost", strlen(host ? host : "localhost")) != 0)
		return failed("the root");
	if (machine ? !set_machine_id(machine) : !hide_boot_id())
		return false;
	if (!write_file(WAITING, ""))
		return failed(WAITING);
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

bool under_systemd, session_awaited;
int session_events = -1;

/* Whether there are programs that make units or variables of what they find, but for
 * systemd's, and GnuPG's, which looks at the user's home alone. */
static bool has_generators(const char *const places[], size_t count)
{
	const struct dirent *entry;
	bool found = false;
	DIR *directory;

	for (size_t i = 0; i < count; i++) {
		directory = opendir(places[i]);
		while (directory && (entry = readdir(directory)))
			if (entry->d_name[0] != '.' && strncmp(entry->d_name, "systemd-", 8) != 0 &&
			    strcmp(entry->d_name, "30-systemd-environment-d-generator") != 0 &&
			    strcmp(entry->d_name, "90gpg-agent") != 0)
				found = true;
		if (directory)
			closedir(directory);
	}
	return found;
}

/* Take away what waits in the sockets of the journal, which process 1 has. */
static void empty_journal_sockets(void)
{
	int init = (int)syscall(SYS_pidfd_open, 1, 0);
	DIR *directory = opendir("/proc/1/fd");
	const struct dirent *entry;

	while (directory && (entry = readdir(directory))) {
		struct sockaddr_un address = {0};
		socklen_t length = sizeof address - 1;
		int fd = (int)syscall(SYS_pidfd_getfd, init, atoi(entry->d_name), 0);
		char byte;

		if (getsockname(fd, (struct sockaddr *)&address, &length) == 0 &&
		    address.sun_family == AF_UNIX &&
		    strncmp(address.sun_path, "/run/systemd/journal/", 21) == 0)
			while (recv(fd, &byte, 1, MSG_DONTWAIT) >= 0)
				;
		close(fd);
	}
	if (directory)
		closedir(directory);
	close(init);
}

/* What the kernel and systemd have logged so far is of no VM. The number of the next
 * message is where the journal begins. */
static void begin_journal(void)
{
	int log = open("/dev/kmsg", O_RDWR | O_NONBLOCK | O_CLOEXEC), file;
	char line[2048] = "<6>qubes: this guest has its identity\n";
	uint64_t number = 0;

	empty_journal_sockets();
	lseek(log, 0, SEEK_END);
	if (write(log, line, strlen(line)) > 0 && read(log, line, sizeof line - 1) > 0 &&
	    sscanf(line, "%*u,%" SCNu64, &number) == 1) {
		mkdir("/run/systemd/journal", 0755);
		file = open("/run/systemd/journal/kernel-seqnum", O_WRONLY | O_CREAT | O_CLOEXEC,
		            0644);
		if (write(file, &number, sizeof number) != sizeof number)
			send_text(LOG, "journal: %s", strerror(errno));
		close(file);
	}
	close(log);
}

/* That this service has started: what is ordered after it has waited for the identity. */
static void tell_systemd(void)
{
	static const char message[] = "READY=1";
	struct sockaddr_un address = {.sun_family = AF_UNIX,
	                              .sun_path = "/run/systemd/notify"};
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	sendto(fd, message, strlen(message), MSG_NOSIGNAL, (struct sockaddr *)&address,
	       sizeof address);
	close(fd);
}

#define USER "1000"
#define SESSION DIRECTORY "/session"
#define USER_DIRECTORY "/run/user/" USER
#define USER_SESSION USER_DIRECTORY "/qubes-session"
#define USER_PROCESSES                                                                     \
	"/sys/fs/cgroup/user.slice/user-" USER ".slice/user@" USER                             \
	".service/init.scope/cgroup.procs"

_Noreturn void run_user_manager(void)
{
	static char *const ready[] = {(char *)(uintptr_t)"/lib/systemd/systemd",
	                              (char *)(uintptr_t)"--user", NULL},
	                   *const waiting[] = {ready[0], ready[1],
	                                       (char *)(uintptr_t)"--unit=qubes-waiting.target",
	                                       NULL};

	/* As pam_systemd does once there is /run/systemd/seats, which may be made later. */
	setenv("XDG_RUNTIME_DIR", USER_DIRECTORY, 1);
	execv(ready[0], access(WAITING, F_OK) == 0 ? waiting : ready);
	die(ready[0]);
}

/* The systemd of the user's session, or 0. */
static pid_t user_manager(void)
{
	char text[1024], path[64], name[32], *rest = text, *line;

	read_file(USER_PROCESSES, text, sizeof text);
	while ((line = strsep(&rest, "\n"))) {
		snprintf(path, sizeof path, "/proc/%d/comm", atoi(line));
		/* the other one there is to close the session of PAM */
		if (*line && read_file(path, name, sizeof name) > 0 &&
		    strcmp(name, "systemd\n") == 0)
			return atoi(line);
	}
	return 0;
}

static bool has_entries(const char *path)
{
	DIR *directory = opendir(path);
	const struct dirent *entry;
	bool found = false;

	while (directory && (entry = readdir(directory)))
		found = found || (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0);
	if (directory)
		closedir(directory);
	return found;
}

/* Whether systemd would not start the session, and tell nobody: of what is masked, it is
 * a device or an empty file. */
static bool is_masked(const char *home)
{
	static const char *const units[] = {"default.target", "basic.target"};
	char path[PATH_LIMIT];
	struct stat status;

	for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
		snprintf(path, sizeof path, "%s/.config/systemd/user/%s", home, units[i]);
		if (stat(path, &status) != 0) {
			snprintf(path, sizeof path, "/etc/systemd/user/%s", units[i]);
			if (stat(path, &status) != 0)
				continue;
		}
		if (status.st_size == 0)
			return true;
	}
	return false;
}

/* That of the session which waits with us, or 0. */
static pid_t waiting_manager;

/* As it would have ended by itself, had it not waited. */
static void end_session(void)
{
	kill(waiting_manager, SIGTERM);
	waiting_manager = 0;
}

/* Units and variables of the session may be on the private disk, or made of what is there:
 * then it reads all anew. */
static void begin_session(void)
{
	static const char *const generators[] = {
		"/etc/systemd/user-generators", "/etc/systemd/user-environment-generators",
		"/usr/lib/systemd/user-generators",
		"/usr/lib/systemd/user-environment-generators"};
	const struct passwd *user = find_user(NULL, (uid_t)atoi(USER));

	if (user && is_masked(user->pw_dir)) {
		end_session();
		return;
	}
	if (!user || has_entries(user->pw_dir) || has_entries("/usr/local") ||
	    has_generators(generators, sizeof generators / sizeof *generators))
		kill(waiting_manager, SIGHUP);
	kill(waiting_manager, SIGRTMIN); /* to it: "start default.target" */
	alarm(SESSION_DEADLINE);
}

/* Told when process 1 makes the socket of qubes-session.socket, and then the systemd of
 * the session its own, where that has waited. */
void session_open(void)
{
	session_events = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
	waiting_manager = user_manager();
	if (inotify_add_watch(session_events, DIRECTORY, IN_CREATE) < 0 ||
	    (waiting_manager && inotify_add_watch(session_events, USER_DIRECTORY, IN_CREATE) < 0))
		die(DIRECTORY);
}

void session_changed(void)
{
	static bool begun;
	char events[1024];

	while (read(session_events, events, sizeof events) > 0)
		;
	if (!session_awaited || access(SESSION, F_OK) != 0)
		return;
	if (waiting_manager && !begun)
		begin_session();
	begun = true;
	if (waiting_manager && access(USER_SESSION, F_OK) != 0 && kill(waiting_manager, 0) == 0)
		return;
	send_frame(DONE, 0, 0, NULL, 0);
	session_awaited = false;
	/* what the user makes there from now on wakes nobody */
	close(session_events);
	session_events = -1;
}

void session_overdue(void)
{
	if (!session_awaited || !waiting_manager)
		return;
	end_session();
	session_changed();
}

/* The root is ours already, mounted read-only: so it is where a state is saved. */
static bool in_waiting_root;

/* Why there is no such stage two, or NULL. */
static const char *find_fault(struct strings identity)
{
	const char *init = value_of(identity, "init"), *name = value_of(identity, "name");
	bool systemd = init && strcmp(init, "systemd") == 0;

	if (init && !systemd && strcmp(init, "agent") != 0)
		return "init is agent or systemd";
	if (!value_of(identity, "root") || (!name && (in_waiting_root || under_systemd)))
		return "name and root are needed";
	if (systemd && name && !under_systemd)
		return "systemd is started without a name, and waits for it";
	if (!systemd && under_systemd)
		return "the init is systemd";
	return NULL;
}

/* Process 1 and the user's systemd are told of each mount, and may be looking at it. */
static bool unmount(const char *path)
{
	const struct timespec pause = {.tv_nsec = PAUSE * 1000000};

	for (int waited = 0; umount(path) != 0; waited += PAUSE) {
		if (errno != EBUSY || waited > DEADLINE)
			return failed(path);
		nanosleep(&pause, NULL);
	}
	return true;
}

/* What comes next is done with other disks once, and undone. Under emulation all of its
 * code is translated then, which takes most of the time. Not with the root: nobody could
 * undo what is in its journal. */
static const char *rehearse(struct strings identity)
{
	const char *private = value_of(identity, "private"),
	           *swap = value_of(identity, "volatile"), *seed = value_of(identity, "seed"),
	           *now = value_of(identity, "time");

	if ((seed && !set_seed(seed)) || (now && set_clock(strtoull(now, NULL, 10))) ||
	    !wait_for_disks(identity, true))
		return problem;
	if (private && !mount_private(private))
		return problem;
	if (private && (mount(NULL, "/rw", NULL, MS_REMOUNT | MS_RDONLY, "") != 0 ||
	                mount(NULL, "/rw", NULL, MS_REMOUNT | MS_LAZYTIME, "") != 0))
		return failed("/rw") ? NULL : problem;
	if (private && (!unmount("/usr/local") || !unmount("/home") || !unmount("/rw")))
		return problem;
	if (swap && !swap_on(swap))
		return problem;
	return swap && swapoff(device(swap)) != 0 && !failed(device(swap)) ? problem : NULL;
}

const char *enter(struct strings identity)
{
	static bool entered;
	const char *seed = value_of(identity, "seed"), *now = value_of(identity, "time"),
	           *private = value_of(identity, "private"),
	           *swap = value_of(identity, "volatile"),
	           *user = value_of(identity, "default-user"),
	           *mode = value_of(identity, "root-mode"),
	           *machine = value_of(identity, "machine-id"),
	           *name = value_of(identity, "name"), *root = value_of(identity, "root"),
	           *init = value_of(identity, "init"), *fault = find_fault(identity);
	static const char *const generators[] = {"/etc/systemd/system-generators",
	                                         "/usr/local/lib/systemd/system-generators",
	                                         "/usr/lib/systemd/system-generators"};
	bool read_only = mode && strcmp(mode, "ro") == 0,
	     by_agent = !init || strcmp(init, "agent") == 0,
	     waited = in_waiting_root || under_systemd;

	if (waited && !entered && value_of(identity, "rehearse"))
		return rehearse(identity);
	if (entered || fault)
		return entered ? "there is no stage two but one" : fault;
	if ((seed && !set_seed(seed)) || (now && set_clock(strtoull(now, NULL, 10))) ||
	    !wait_for_disks(identity, waited) ||
	    (!waited && !switch_root(root, read_only || !name)) ||
	    (waited && !read_only && !make_writable(root)))
		return problem;
	entered = name || !by_agent;
	in_waiting_root = true;
	if (!waited) {
		mount_rest();
		loopback_up();
	}
	if (!waited && by_agent)
		make_runtime();
	if (!name)
		return by_agent || hand_over(value_of(identity, "host-name"), machine) ? NULL
		                                                                       : problem;
	if (user)
		snprintf(default_user, sizeof default_user, "%s", user);
	if ((private && !mount_private(private)) || !set_entries(identity) ||
	    (machine && !set_machine_id(machine)) || (swap && !swap_on(swap)))
		return problem;
	if (!under_systemd)
		return NULL;
	umount2(BOOT_ID, MNT_DETACH);
	unlink(WAITING);
	begin_journal();
	/* What systemd has not seen: units on the private disk, and what generators make of
	 * an identity. It reads all anew. */
	if ((access("/usr/local/lib/systemd/system", F_OK) == 0 ||
	     has_generators(generators, sizeof generators / sizeof *generators)) &&
	    kill(1, SIGHUP) != 0)
		return failed("process 1") ? NULL : problem;
	/* The answer is left to session_changed(). */
	session_awaited = kill(1, SIGRTMIN) == 0; /* to it: "start default.target" */
	tell_systemd();
	return session_awaited || failed("process 1") ? NULL : problem;
}
