/* What systemd does at boot, where it is not process 1: made once, with the image. */
#include "agent.h"

#include <ftw.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/sendfile.h>

/* A copy of what systemd-tmpfiles makes in /run, as that is empty at each start. */
#define MADE "/usr/lib/qubes/run"
/* There if the image names modules that are to be loaded. */
#define LOAD_MODULES "/usr/lib/qubes/load-modules"

static bool copy_file(const char *path, const char *target, off_t size)
{
	int from = open(path, O_RDONLY | O_CLOEXEC);
	int to = open(target, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	off_t done = 0;

	while (from >= 0 && to >= 0 && done < size &&
	       sendfile(to, from, &done, (size_t)(size - done)) > 0)
		;
	close(from);
	return close(to) == 0 && done == size;
}

static bool make(const char *path, const char *target, const struct stat *status)
{
	char link[PATH_LIMIT] = "";

	if (S_ISDIR(status->st_mode))
		return mkdir(target, 0700) == 0 || errno == EEXIST;
	if (S_ISLNK(status->st_mode))
		return readlink(path, link, sizeof link - 1) > 0 && symlink(link, target) == 0;
	if (S_ISFIFO(status->st_mode))
		return mkfifo(target, 0600) == 0;
	return copy_file(path, target, status->st_size);
}

static int copy_one(const char *path, const struct stat *status, int type,
                    struct FTW *place)
{
	char target[PATH_LIMIT];

	(void)type;
	snprintf(target, sizeof target, "/run%s", path + strlen(MADE));
	/* The owner first: to change it takes bits of the mode away. */
	if (place->level > 0 &&
	    (!make(path, target, status) ||
	     lchown(target, status->st_uid, status->st_gid) != 0 ||
	     (!S_ISLNK(status->st_mode) && chmod(target, status->st_mode & 07777) != 0)))
		send_text(LOG, "%s: %s", target, strerror(errno));
	return 0;
}

static void load_modules(void)
{
	static char *const argv[] = {(char *)(uintptr_t)LOAD_MODULES, NULL};
	sigset_t none;
	pid_t child;
	int status = 0;

	if (access(LOAD_MODULES, X_OK) != 0)
		return;
	/* Waited for by its number, in the middle of a frame: SIGCHLD of others stays pending
	 * meanwhile, and they are reaped in the loop. */
	child = fork();
	if (child == 0) {
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		execv(argv[0], argv);
		_exit(NOT_FOUND);
	}
	if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
		send_text(LOG, "not all modules that modules-load.d names are loaded");
}

/* Interfaces of the kernel that are filesystems: those that it has. */
static void mount_interfaces(void)
{
	static const char *const places[][2] = {
		{"mqueue", "/dev/mqueue"}, {"debugfs", "/sys/kernel/debug"},
		{"tracefs", "/sys/kernel/tracing"}, {"configfs", "/sys/kernel/config"},
		{"fusectl", "/sys/fs/fuse/connections"}};

	for (size_t i = 0; i < sizeof places / sizeof *places; i++)
		mount_kernel(places[i][0], places[i][1], NULL);
}

/* Nodes by which the kernel loads a module when one is opened: what depmod has found. */
static void make_static_nodes(void)
{
	char line[PATH_LIMIT], name[NAME_LIMIT], path[PATH_LIMIT], kind;
	unsigned int first, second;
	struct utsname kernel;
	FILE *list;

	uname(&kernel);
	snprintf(path, sizeof path, "/usr/lib/modules/%s/modules.devname", kernel.release);
	list = fopen(path, "re");
	while (list && fgets(line, sizeof line, list)) {
		if (sscanf(line, "%*s %255s %c%u:%u", name, &kind, &first, &second) != 4)
			continue;
		/* as in mapper/control: one directory at most */
		snprintf(path, sizeof path, "/dev/%.*s", (int)strcspn(name, "/"), name);
		if (strchr(name, '/'))
			mkdir(path, 0755);
		snprintf(path, sizeof path, "/dev/%s", name);
		mknod(path, (kind == 'b' ? S_IFBLK : S_IFCHR) | 0600, makedev(first, second));
	}
	if (list)
		fclose(list);
}

void make_runtime(void)
{
	make_static_nodes();
	nftw(MADE, copy_one, 16, FTW_PHYS);
	load_modules();
	mount_interfaces();
}
