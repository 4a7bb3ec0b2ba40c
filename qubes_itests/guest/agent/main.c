/* One program, told by the name it is called by. */
#include "agent.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ssize_t read_file(const char *path, char *buffer, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, buffer, size - 1);

	if (fd >= 0)
		close(fd);
	buffer[length < 0 ? 0 : length] = '\0';
	return length;
}

#ifdef AGENT_TEST
/* agent --test-fd N: speak the protocol over that descriptor, as an ordinary process. */
static int test_main(int argc, char **argv)
{
	if (argc != 3 || strcmp(argv[1], "--test-fd") != 0) {
		fputs("usage: agent --test-fd N\n", stderr);
		return 2;
	}
	testing = true;
	calls_listen();
	run_loop(atoi(argv[2]));
}
#endif

int main(int argc, char **argv)
{
	const char *name = argc > 0 ? strrchr(argv[0], '/') : NULL;

	name = name ? name + 1 : argc > 0 ? argv[0] : "";
#ifdef AGENT_TEST
	if (getenv("AGENT_PREFIX"))
		root_prefix = getenv("AGENT_PREFIX");
#endif
	if (strcmp(name, "qrexec-client-vm") == 0)
		return client_main(argc, argv);
	if (strncmp(name, "qubesdb-", 8) == 0)
		return qubesdb_main(argc, argv, name + 8);
#ifdef AGENT_TEST
	return test_main(argc, argv);
#else
	if (getpid() != 1) {
		fputs("this is the init of a guest; it runs as process 1 only\n", stderr);
		return 2;
	}
	run_loop(boot());
#endif
}
