/* Commands and services: who runs them, with what environment, and which file. */
#include "agent.h"

#include <grp.h>
#include <sched.h>
#include <sys/ioctl.h>

#define PATH_VALUE "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define SERVICE_SHELL "/usr/lib/qubes/sh"
/* A copy of /etc/profile, in an image whose builder knows what that does: nothing but
 * what set_known_login() does. */
#define KNOWN_PROFILE "/usr/lib/qubes/profile"

enum { GROUPS_MAX = 64 };

char default_user[NAME_LIMIT] = "user";

struct passwd *find_user(const char *name, uid_t uid)
{
	FILE *file = fopen(in_root("/etc/passwd"), "re");
	struct passwd *user = NULL;

	while (file && (user = fgetpwent(file)))
		if (name ? strcmp(name, user->pw_name) == 0 : uid == user->pw_uid)
			break;
	if (file)
		fclose(file);
	return user;
}

static size_t find_groups(const struct passwd *user, gid_t groups[GROUPS_MAX])
{
	FILE *file = fopen(in_root("/etc/group"), "re");
	const struct group *group;
	size_t count = 0;

	groups[count++] = user->pw_gid;
	while (file && count < GROUPS_MAX && (group = fgetgrent(file)))
		for (char **member = group->gr_mem; *member; member++)
			if (strcmp(*member, user->pw_name) == 0 && count < GROUPS_MAX)
				groups[count++] = group->gr_gid;
	if (file)
		fclose(file);
	return count;
}

/* The agent's own environment is the next command's; it needs none itself. */
static void set_variable(const char *name, const char *value)
{
	static char texts[14][2 * PATH_LIMIT];
	static size_t next;
	char *text = texts[next++ % 14]; /* no command has more */

	snprintf(text, sizeof texts[0], "%s=%s", name, value);
	putenv(text);
}

static void set_login_environment(const struct passwd *user)
{
	char directory[64];

	clearenv();
	snprintf(directory, sizeof directory, "/run/user/%u", user->pw_uid);
	/* Only as far as it is absent: what is there may hold sockets. */
	mkdir(in_root("/run/user"), 0755);
	if (mkdir(in_root(directory), 0700) == 0 &&
	    chown(in_root(directory), user->pw_uid, user->pw_gid) != 0)
		send_text(LOG, "%s: %s", directory, strerror(errno));
	set_variable("HOME", user->pw_dir);
	set_variable("USER", user->pw_name);
	set_variable("LOGNAME", user->pw_name);
	set_variable("SHELL", user->pw_shell);
	set_variable("PATH", PATH_VALUE);
	set_variable("XDG_RUNTIME_DIR", in_root(directory));
}

bool is_empty(const char *path)
{
	DIR *directory = opendir(path);
	const struct dirent *entry;
	bool empty = true;

	while (directory && empty && (entry = readdir(directory)))
		empty = entry->d_name[0] == '.';
	if (directory)
		closedir(directory);
	return empty;
}

/* Whether all that a login shell of this user would do before a service is known. */
static bool login_known(const struct passwd *user)
{
	char known[PATH_LIMIT], profile[PATH_LIMIT], path[PATH_LIMIT];

	snprintf(path, sizeof path, "%.1000s/.profile", user->pw_dir);
	return strcmp(user->pw_shell, "/bin/sh") == 0 &&
	       read_file(in_root(KNOWN_PROFILE), known, sizeof known) > 0 &&
	       read_file(in_root("/etc/profile"), profile, sizeof profile) > 0 &&
	       strcmp(profile, known) == 0 && is_empty(in_root("/etc/profile.d")) &&
	       access(in_root(path), F_OK) != 0 && errno == ENOENT;
}

/* In its place, for to execute a shell takes a third of a call under emulation. What is
 * not known, and where it would go on elsewhere than at home, is left to the shell. */
static bool set_known_login(const struct passwd *user)
{
	char *home = login_known(user) ? realpath(in_root(user->pw_dir), NULL) : NULL;

	if (!home)
		return false;
	set_variable("LANG", "C.UTF-8");
	set_variable("PWD", home);
	set_variable("SHLVL", "1");
	free(home);
	return true;
}

static int fail(struct failure *failure, int value, const char *text, const char *name)
{
	failure->value = value;
	snprintf(failure->text, sizeof failure->text, "%s%.256s", text, name);
	return -1;
}

static void use_service(const char *argv[6], const struct service *service,
                        const char *name, const char *source, pid_t listener)
{
	const char *argument = strchr(name, '+');
	char number[16];

	snprintf(number, sizeof number, "%d", (int)listener);
	if (listener > 0)
		set_variable("QREXEC_AGENT_PID", number);

	set_variable("QREXEC_REMOTE_DOMAIN", source);
	set_variable("QREXEC_REQUESTED_TARGET_TYPE", "");
	set_variable("QREXEC_SERVICE_FULL_NAME", name);
	set_variable("QREXEC_SERVICE_ARGUMENT", argument ? argument + 1 : "");
	/* Through the login shell, so that the profile is read. */
	argv[2] = "exec \"$0\" \"$@\"";
	argv[3] = service->path;
	argv[4] = argument && argument[1] ? argument + 1 : NULL;
}

/* Runs in the vforked child, which shares the agent's memory until it executes: what it
 * writes there stays. So all that takes memory or files is looked up before, and here
 * are system calls alone. */
static int become(const struct passwd *user, const gid_t *groups, size_t group_count,
                  const int stdio[3])
{
	sigset_t none;

	/* Blocked and ignored signals outlive execve(2): a shell whose SIGCHLD is blocked
	 * waits for ever, and a pipeline whose SIGPIPE is ignored does not end. A vforked
	 * child has a copy of these, so the agent's own stay. */
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	/* The agent's own is SCHED_BATCH, which SCHED_RESET_ON_FORK would not reset. */
	sched_setscheduler(0, SCHED_OTHER, &(struct sched_param){0});
	/* A session of its own, so that kill(-pid) reaches the command's children and nobody
	 * else, and so that it can have a controlling terminal. */
	setsid();
	for (int i = 0; i < 3; i++)
		/* Its own, so that it may open /dev/stdout. */
		if (dup2(stdio[i], i) != i || fchown(i, user->pw_uid, user->pw_gid) != 0)
			return errno;
	/* To be signalled by its keys, and hung up with it. */
	if (isatty(STDIN_FILENO) && ioctl(STDIN_FILENO, TIOCSCTTY, 0) != 0)
		return errno;
	/* Groups first: who is no longer root cannot set them, and would keep root's. */
	if (geteuid() == 0 && (setgroups(group_count, groups) != 0 ||
	                       setgid(user->pw_gid) != 0 || setuid(user->pw_uid) != 0))
		return errno;
	if (chdir(user->pw_dir) != 0 && chdir("/") != 0)
		return errno;
	return 0;
}

static pid_t start(const struct passwd *user, const char *shell, const char *argv[6],
                   bool direct, const int stdio[3], struct failure *failure)
{
	gid_t groups[GROUPS_MAX];
	size_t group_count = find_groups(user, groups);
	/* The child reports by memory, which it shares, what kept it from executing. vfork(2)
	 * returns here only when it has executed or ended, so `error` is final then. */
	volatile int error = 0;
	pid_t pid = vfork();

	if (pid == 0) {
		error = become(user, groups, group_count, stdio);
		/* What cannot be executed the shell takes for a script, or says why not. It
		 * counts itself. */
		if (error == 0 && direct) {
			execv(argv[3], (char *const *)(uintptr_t)(argv + 3));
			unsetenv("SHLVL");
		}
		if (error == 0)
			execv(shell, (char *const *)(uintptr_t)argv);
		error = error ? error : errno;
		/* Not exit(3): it would flush and free what is the parent's. */
		_exit(NOT_FOUND);
	}
	if (pid < 0)
		return fail(failure, REFUSED, "no process: ", strerror(errno));
	if (error == 0)
		return pid;
	/* The child is reaped with the orphans. */
	fail(failure, error == ENOENT ? NOT_FOUND : REFUSED, "cannot execute ", shell);
	snprintf(failure->text + strlen(failure->text), 64, ": %s", strerror(error));
	return -1;
}

pid_t spawn(struct strings request, const struct service *service, const int stdio[3],
            uid_t *uid, struct failure *failure)
{
	char shell_name[NAME_LIMIT];
	const char *kind = next_string(&request), *name = next_string(&request),
	           *line = next_string(&request), *source = next_string(&request), *variable;
	const char *argv[6] = {shell_name, "-c", line}, *shell;
	bool terminal = strcmp(kind, "terminal") == 0, direct;
	struct passwd *user;

	if (!source || (!service && !terminal && strcmp(kind, "command") != 0))
		return fail(failure, REFUSED, "no valid request for a ", kind);
	if (service && *service->user)
		name = service->user;
	user = find_user(*name ? name : default_user, 0);
	if (!user)
		return fail(failure, NOT_FOUND, "there is no user ", *name ? name : default_user);
	set_login_environment(user);
	if (service)
		use_service(argv, service, line, source, listener_of(user));
	if (terminal && !*line)
		argv[1] = NULL;
	*uid = user->pw_uid;
	while ((variable = next_string(&request)))
		if (strchr(variable, '=') > variable)
			putenv((char *)(uintptr_t)variable);
	direct = service && set_known_login(user);
	/* A service is no command of its user's shell: a quicker one reads the profile. */
	shell = service && access(SERVICE_SHELL, X_OK) == 0 ? SERVICE_SHELL : user->pw_shell;
	snprintf(shell_name, sizeof shell_name, "-%s", basename(shell));
	return start(user, shell, argv, direct, stdio, failure);
}
