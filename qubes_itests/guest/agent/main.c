/* One program, told by the name it is called by. */
#include "agent.h"

bool testing;
static const char *root_prefix = "";

const char *in_root(const char *path)
{
	static char result[PATH_LIMIT];

	snprintf(result, sizeof result, "%s%s", root_prefix, path);
	return result;
}

ssize_t read_file(const char *path, char *buffer, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = read(fd, buffer, size - 1);

	close(fd);
	buffer[length < 0 ? 0 : length] = '\0';
	return length;
}

_Noreturn void die(const char *what)
{
	dprintf(STDERR_FILENO, "agent: %s: %s\n", what, strerror(errno));
	if (testing)
		exit(1);
	power_off(false);
}

int main(int argc, char **argv)
{
	const char *name = basename(argv[0]);

#ifdef AGENT_TEST
	if (getenv("AGENT_PREFIX"))
		root_prefix = strdup(getenv("AGENT_PREFIX"));
#endif
	if (strcmp(name, "qrexec-client-vm") == 0)
		return client_main(argc, argv);
	if (strncmp(name, "qubesdb-", 8) == 0)
		return qubesdb_main(argc, argv, name + 8);
	if (argc == 4 && strcmp(argv[1], SERVE_BLOCK) == 0)
		return nbd_main(argv[2], argv[3]);
#ifdef AGENT_TEST
	/* agent FD: speak the protocol over that descriptor, as an ordinary process. */
	testing = true;
	run_loop(atoi(argv[argc - 1]), -1, false);
#else
	if (getpid() == 1)
		run_loop(boot(), disks_open(), false);
	if (argc == 2 && strcmp(argv[1], "resume") == 0)
		run_loop(resume(), disks_open(), true);
	if (argc == 2 && strcmp(argv[1], "user-manager") == 0)
		run_user_manager();
	if (argc == 3 && strcmp(argv[1], RUNTIME_DIRECTORY) == 0) {
		const struct passwd *user = find_user(NULL, (uid_t)atoi(argv[2]));

		return user && make_runtime_directory(user) ? 0 : 1;
	}
	if (argc > 2)
		return network_main(argc, argv);
	fputs("this is the init of a guest; it runs as process 1, or goes on under another\n",
	      stderr);
	return 2;
#endif
}
