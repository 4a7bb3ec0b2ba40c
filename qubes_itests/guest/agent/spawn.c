/* Commands and services: who runs them, with what environment, and which file. */
#include "agent.h"

#include <errno.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TABLE_MAX = 65536, ENVIRONMENT_MAX = 256, GROUPS_MAX = 64 };
#define PATH_VALUE "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

char default_user[NAME_LIMIT] = "user";
const char *root_prefix = "";

struct command {
	struct user user;
	gid_t groups[GROUPS_MAX];
	size_t group_count;
	const char *file;
	const char *argv[6];
	const char *environment[ENVIRONMENT_MAX];
	size_t environment_count;
	const int *stdio;
};

const char *in_root(const char *path)
{
	static char result[PATH_LIMIT];

	snprintf(result, sizeof result, "%s%s", root_prefix, path);
	return result;
}

static const char *read_table(const char *path)
{
	static char table[TABLE_MAX];

	read_file(in_root(path), table, sizeof table);
	return table;
}

/* Take the next line of a table into `line`, cut at colons; the number of fields. */
static size_t next_line(const char **table, char *line, size_t size, char *fields[],
                        size_t maximum)
{
	size_t length = strcspn(*table, "\n"), count = 0;
	char *rest = line;

	snprintf(line, size, "%.*s", (int)(length < size ? length : size - 1), *table);
	*table += length + ((*table)[length] == '\n');
	while (count < maximum && rest)
		fields[count++] = strsep(&rest, ":");
	return count;
}

bool find_user(const char *name, uid_t uid, struct user *user)
{
	const char *table = read_table("/etc/passwd");
	char *field[7];

	if (*table == '\0') /* stage one */
		table = "root:x:0:0:root:/:/bin/sh\n";
	while (*table) {
		if (next_line(&table, user->line, sizeof user->line, field, 7) < 7)
			continue;
		user->uid = (uid_t)strtoul(field[2], NULL, 10);
		user->gid = (gid_t)strtoul(field[3], NULL, 10);
		user->name = field[0];
		user->home = field[5];
		user->shell = *field[6] ? field[6] : "/bin/sh";
		if (name ? strcmp(name, user->name) == 0 : uid == user->uid)
			return true;
	}
	return false;
}

static void find_groups(struct command *command)
{
	const char *table = read_table("/etc/group");
	char line[PATH_LIMIT], *field[4];

	command->groups[command->group_count++] = command->user.gid;
	while (*table && command->group_count < GROUPS_MAX) {
		if (next_line(&table, line, sizeof line, field, 4) < 4)
			continue;
		for (char *member; (member = strsep(&field[3], ","));)
			if (strcmp(member, command->user.name) == 0)
				command->groups[command->group_count++] =
					(gid_t)strtoul(field[2], NULL, 10);
	}
}

/* Add NAME=value; a later value takes an earlier one's place. */
static void set_variable(struct command *command, const char *name, const char *value)
{
	static char texts[8 * PATH_LIMIT];
	static size_t used;
	size_t name_length = strcspn(name, "="), i = 0;
	int length;

	if (command->environment_count == 0)
		used = 0;
	if (value) {
		length = snprintf(texts + used, sizeof texts - used, "%s=%s", name, value);
		name = texts + used;
		used += (size_t)length + 1;
		if (used > sizeof texts)
			die("environment");
	}
	while (i < command->environment_count &&
	       (strncmp(command->environment[i], name, name_length) != 0 ||
	        command->environment[i][name_length] != '='))
		i++;
	if (i == ENVIRONMENT_MAX - 1)
		return;
	command->environment[i] = name;
	if (i == command->environment_count)
		command->environment_count++;
}

static void set_login_environment(struct command *command)
{
	const struct user *user = &command->user;
	char directory[64];

	snprintf(directory, sizeof directory, "/run/user/%u", user->uid);
	/* Only as far as it is absent: what is there may hold sockets. */
	mkdir(in_root("/run/user"), 0755);
	if (mkdir(in_root(directory), 0700) == 0 && geteuid() == 0 &&
	    chown(in_root(directory), user->uid, user->gid) != 0)
		send_text(LOG, "%s: %s", directory, strerror(errno));
	set_variable(command, "HOME", user->home);
	set_variable(command, "USER", user->name);
	set_variable(command, "LOGNAME", user->name);
	set_variable(command, "SHELL", user->shell);
	set_variable(command, "PATH", PATH_VALUE);
	set_variable(command, "XDG_RUNTIME_DIR", in_root(directory));
}

static bool service_name_valid(const char *name)
{
	size_t length = strlen(name);

	if (length == 0 || length >= NAME_LIMIT || *name == '.' || *name == '+' ||
	    *name == '-')
		return false;
	for (size_t i = 0; i < length; i++)
		if (name[i] <= ' ' || name[i] > '~' || strchr("/\\'\"`$*?[]{}()<>|&;!#~", name[i]))
			return false;
	return true;
}

/* Look in the directories for SERVICE+ARG, then for SERVICE. */
static bool find_service(const char *name, const char *const *directories, char *path,
                         struct stat *status)
{
	size_t lengths[2] = {strlen(name), strcspn(name, "+")};

	for (int i = 0; i < 2; i++)
		for (const char *const *directory = directories; *directory; directory++) {
			snprintf(path, PATH_LIMIT, "%s%s/%.*s", root_prefix, *directory,
			         (int)lengths[i], name);
			if (stat(path, status) == 0)
				return true;
		}
	return false;
}

/* The user that the service's configuration demands, or none. */
static bool forced_user(const char *service, char *user)
{
	static const char *const directories[] = {"/etc/qubes/rpc-config", NULL};
	char path[PATH_LIMIT], line[PATH_LIMIT], *field[1];
	const char *table;
	struct stat status;

	if (!find_service(service, directories, path, &status))
		return false;
	table = read_table(path + strlen(root_prefix));
	while (*table) {
		next_line(&table, line, sizeof line, field, 1);
		if (sscanf(line, " force-user = %255[^ \t'\"]", user) == 1 ||
		    sscanf(line, " force-user = %*['\"]%255[^'\"]", user) == 1)
			return true;
	}
	return false;
}

static int fail(struct failure *failure, int value, const char *text, const char *name)
{
	failure->value = value;
	snprintf(failure->text, sizeof failure->text, "%s%.256s", text, name);
	return -1;
}

static int use_service(struct command *command, const char *service, const char *source,
                       struct failure *failure)
{
	static const char *const directories[] = {
		"/usr/local/etc/qubes-rpc", "/etc/qubes-rpc", NULL};
	static char path[PATH_LIMIT];
	const char *argument = strchr(service, '+');
	struct stat status;

	if (!find_service(service, directories, path, &status))
		return fail(failure, NOT_FOUND, "there is no service ", service);
	if (!S_ISREG(status.st_mode) || !(status.st_mode & 0111))
		return fail(failure, REFUSED, "not an executable file: ", path);
	set_variable(command, "QREXEC_REMOTE_DOMAIN", source);
	set_variable(command, "QREXEC_SERVICE_FULL_NAME", service);
	set_variable(command, "QREXEC_SERVICE_ARGUMENT", argument ? argument + 1 : "");
	/* Through the login shell, so that the profile is read. */
	command->argv[2] = "exec \"$0\" \"$@\"";
	command->argv[3] = path;
	command->argv[4] = argument && argument[1] ? argument + 1 : NULL;
	return 0;
}

/* Runs in the vforked child, which shares the agent's memory until it executes. */
static int become(const struct command *command)
{
	const struct user *user = &command->user;
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	for (int i = 0; i < 3; i++)
		if (dup2(command->stdio[i], i) != i)
			return errno;
	if (geteuid() == 0 && (setgroups(command->group_count, command->groups) != 0 ||
	                       setgid(user->gid) != 0 || setuid(user->uid) != 0))
		return errno;
	if (chdir(user->home) != 0 && chdir("/") != 0)
		return errno;
	execve(command->file, (char *const *)(uintptr_t)command->argv,
	       (char *const *)(uintptr_t)command->environment);
	return errno;
}

static pid_t start(const struct command *command, struct failure *failure)
{
	volatile int error = 0;
	pid_t pid = vfork();

	if (pid == 0) {
		error = become(command);
		_exit(127);
	}
	if (pid < 0)
		return fail(failure, REFUSED, "no process: ", strerror(errno));
	if (error) { /* the child is reaped with the orphans */
		fail(failure, error == ENOENT ? NOT_FOUND : REFUSED, "cannot execute ",
		     command->file);
		snprintf(failure->text + strlen(failure->text), 64, ": %s", strerror(error));
		return -1;
	}
	return pid;
}

pid_t spawn(struct strings request, const int stdio[3], struct failure *failure)
{
	static struct command command;
	static char shell_name[NAME_LIMIT], forced[NAME_LIMIT];
	const char *kind = next_string(&request), *user = next_string(&request),
	           *line = next_string(&request), *source = next_string(&request), *variable;
	bool service;

	if (!source || strlen(source) >= NAME_LIMIT)
		return fail(failure, REFUSED, "the request is not valid", "");
	service = strcmp(kind, "service") == 0;
	if (!service && strcmp(kind, "command") != 0)
		return fail(failure, REFUSED, "there is no kind ", kind);
	if (service && !service_name_valid(line))
		return fail(failure, REFUSED, "the service's name is not allowed", "");
	if (service && forced_user(line, forced))
		user = forced;
	user = *user ? user : default_user;
	command.group_count = command.environment_count = 0;
	command.stdio = stdio;
	if (!find_user(user, 0, &command.user))
		return fail(failure, NOT_FOUND, "there is no user ", user);
	find_groups(&command);
	set_login_environment(&command);
	command.file = command.user.shell;
	user = strrchr(command.file, '/');
	snprintf(shell_name, sizeof shell_name, "-%s", user ? user + 1 : command.file);
	memcpy(command.argv, (const char *[6]){shell_name, "-c", line}, sizeof command.argv);
	if (service && use_service(&command, line, source, failure) < 0)
		return -1;
	while ((variable = next_string(&request)))
		if (strchr(variable, '=') > variable)
			set_variable(&command, variable, NULL);
	command.environment[command.environment_count] = NULL;
	return start(&command, failure);
}
