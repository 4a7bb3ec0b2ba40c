/* Stage one, and the end: what init does before the host speaks and when all is over. */
#include "agent.h"

#include <cpuid.h>
#include <linux/reboot.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <time.h>

bool mount_kernel(const char *type, const char *path, const char *options)
{
	mkdir(path, 0755);
	return mount(type, path, type, MS_NOSUID, options) == 0;
}

/* One line of /modules: a path. */
static void load_module(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) != 0)
		dprintf(STDERR_FILENO, "agent: %s: %s\n", path, strerror(errno));
	close(fd);
}

static void load_modules(void)
{
	static char list[16384];
	char *rest = list, *line;

	read_file("/modules", list, sizeof list);
	while ((line = strsep(&rest, "\n")))
		if (*line)
			load_module(line);
}

static int find_port(void)
{
	DIR *directory = opendir("/sys/class/virtio-ports");
	const struct dirent *entry;
	char path[PATH_LIMIT], name[64];
	int fd = -1;

	while (directory && fd < 0 && (entry = readdir(directory))) {
		snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
		read_file(path, name, sizeof name);
		snprintf(path, sizeof path, "/dev/%s", entry->d_name);
		if (strcmp(name, PORT_NAME "\n") == 0)
			fd = open(path, O_RDWR);
	}
	if (directory)
		closedir(directory);
	return fd;
}

/* Woken by a command that writes, the agent shall not preempt it at once, but find
 * much to send. */
static int wait_for_port(void)
{
	struct sched_param parameter = {0};
	const struct timespec pause = {.tv_nsec = 10000000};
	int fd;

	sched_setscheduler(0, SCHED_BATCH, &parameter);
	while ((fd = find_port()) < 0)
		nanosleep(&pause, NULL);
	return fd;
}

/* Whether the CPU is QEMU's own, as the CPU itself says. */
static bool is_emulated(void)
{
	unsigned int highest, name[3];

	__cpuid(0x40000000, highest, name[0], name[1], name[2]);
	return memcmp(name, "TCGTCGTCGTCG", sizeof name) == 0;
}

/* How much of a file is mapped at one fault, and unmapped when the program ends. Of the
 * kernel's 64 KiB a shell needs so little that under emulation half of it is quicker: by
 * 4 % for a fork, 3 % for a command. Only debugfs has it, which guests shall not find. */
static void set_fault_around(void)
{
	static const char place[] = "/sys/kernel/debug", value[] = "32768";
	char path[PATH_LIMIT];
	int fd;

	if (!is_emulated() || !mount_kernel("debugfs", place, NULL))
		return;
	snprintf(path, sizeof path, "%s/fault_around_bytes", place);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		dprintf(STDERR_FILENO, "agent: %s: %s\n", path, strerror(errno));
	close(fd);
	umount(place);
}

int boot(void)
{
	int console;

	mount_kernel("devtmpfs", "/dev", "");
	console = open("/dev/console", O_RDWR | O_CLOEXEC);
	for (int i = 0; console >= 0 && i < 3; i++)
		dup2(console, i);
	mount_kernel("proc", "/proc", "");
	mount_kernel("sysfs", "/sys", "");
	set_fault_around();
	mount_kernel("tmpfs", "/run", "mode=755");
	load_modules();
	return wait_for_port();
}

int resume(void)
{
	under_systemd = true;
	return wait_for_port();
}

/* Whether all processes but init have ended within the time: then it has no child. */
static bool all_ended(int signal_number, int milliseconds)
{
	const struct timespec pause = {.tv_nsec = 10000000};

	/* All but process 1 itself. One that is stopped takes no SIGTERM before it goes on. */
	kill(-1, signal_number);
	kill(-1, SIGCONT);
	for (; milliseconds > 0; milliseconds -= 10) {
		pid_t pid;

		while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
			;
		if (pid < 0)
			return true;
		nanosleep(&pause, NULL);
	}
	return false;
}

_Noreturn void power_off(bool reboot_instead)
{
	static const char *const mounted[] = {"/usr/local", "/home", "/rw", "/"};

	if (testing)
		exit(0);
	if (getpid() != 1) {
		/* As systemd wants to be told by who has no bus. */
		kill(1, SIGRTMIN + (reboot_instead ? 5 : 4));
		exit(0);
	}
	if (!all_ended(SIGTERM, 2000))
		all_ended(SIGKILL, 1000);
	/* Writes of processes that are gone may still be in memory, and what cannot be
	 * unmounted is made read-only: reboot(2) itself brings nothing to the disk. */
	sync();
	for (size_t i = 0; i < sizeof mounted / sizeof *mounted; i++)
		if (umount(mounted[i]) != 0)
			mount(NULL, mounted[i], NULL, MS_REMOUNT | MS_RDONLY, NULL);
	reboot(reboot_instead ? RB_AUTOBOOT : RB_POWER_OFF);
	/* Process 1 must not return: the kernel panics, which the host would take for one. */
	for (;;)
		pause();
}
