/* qrexec-client-vm [options] [--] TARGET SERVICE[+ARG] [LOCAL_COMMAND [ARGUMENT…]] */
#include "agent.h"

#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BUFFER = 65536, CLIENT_FAILED = 125 };

static const char *agent_socket;

static int open_options(int argc, char **argv)
{
	/* Filters are for terminals, which no command of the agent has. */
	static const struct option options[] = {
		{"buffer-size", required_argument, NULL, 'b'},
		{"filter-escape-chars-stdout", no_argument, NULL, 't'},
		{"filter-escape-chars-stderr", no_argument, NULL, 'T'},
		{"no-filter-escape-chars-stdout", no_argument, NULL, 'n'},
		{"no-filter-escape-chars-stderr", no_argument, NULL, 'N'},
		{"agent-socket", required_argument, NULL, 'a'},
		{NULL, 0, NULL, 0},
	};
	int option;

	while ((option = getopt_long(argc, argv, "+tTa:", options, NULL)) != -1) {
		if (option == '?')
			return -1;
		if (option == 'a')
			agent_socket = optarg;
	}
	return argc - optind < 2 ? -1 : optind;
}

/* Ask the agent for the call, handing it `stdio`; the connection, or -1. */
static int request_call(const char *target, const char *service, int stdio)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr header;
	} control = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)),
	                        .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
	struct iovec parts[2] = {{(void *)(uintptr_t)target, strlen(target) + 1},
	                         {(void *)(uintptr_t)service, strlen(service) + 1}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2,
	                         .msg_control = &control, .msg_controllen = sizeof control};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	memcpy(CMSG_DATA(&control.header), &stdio, sizeof(int));
	snprintf(address.sun_path, sizeof address.sun_path, "%s",
	         agent_socket ? agent_socket : in_root(SOCKET_PATH));
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
	    sendmsg(fd, &message, MSG_NOSIGNAL) < 0) {
		fprintf(stderr, "qrexec-client-vm: %s: %s\n", address.sun_path,
		        strerror(errno));
		return -1;
	}
	return fd;
}

/* The local command's stdio is the call; what was ours it finds as SAVED_FD_0 and _1. */
static pid_t start_local(char **argv, int stdio)
{
	pid_t pid = fork();
	char number[16];

	if (pid != 0)
		return pid;
	signal(SIGPIPE, SIG_DFL);
	snprintf(number, sizeof number, "%d", dup(STDIN_FILENO));
	setenv("SAVED_FD_0", number, 1);
	snprintf(number, sizeof number, "%d", dup(STDOUT_FILENO));
	setenv("SAVED_FD_1", number, 1);
	if (dup2(stdio, STDIN_FILENO) < 0 || dup2(stdio, STDOUT_FILENO) < 0)
		_exit(CLIENT_FAILED);
	execvp(argv[0], argv);
	fprintf(stderr, "qrexec-client-vm: %s: %s\n", argv[0], strerror(errno));
	_exit(NOT_FOUND);
}

static bool write_all(int fd, const char *bytes, size_t length)
{
	while (length > 0) {
		ssize_t done = write(fd, bytes, length);

		if (done < 0 && errno != EINTR)
			return false;
		bytes += done < 0 ? 0 : done;
		length -= done < 0 ? 0 : (size_t)done;
	}
	return true;
}

/* Copy one bufferful; false: one of the two ends is gone. */
static bool copy(int from, int to)
{
	static char buffer[BUFFER];
	ssize_t length = read(from, buffer, sizeof buffer);

	if (length < 0 && errno == EINTR)
		return true;
	return length > 0 && write_all(to, buffer, (size_t)length);
}

/* Input is pumped by a child, so that a stuck reader of either end holds up one way. */
static pid_t pump(int stdio)
{
	pid_t parent = getpid(), writer = fork();

	if (writer == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		while (getppid() == parent && copy(STDIN_FILENO, stdio))
			;
		shutdown(stdio, SHUT_WR);
		_exit(0);
	}
	while (copy(stdio, STDOUT_FILENO))
		;
	shutdown(stdio, SHUT_RD);
	close(stdio);
	return writer;
}

static int read_status(int control)
{
	char message[1 + TEXT_MAX];
	ssize_t length;

	do
		length = recv(control, message, sizeof message, 0);
	while (length < 0 && errno == EINTR);
	if (length < 1) {
		fputs("qrexec-client-vm: the agent has gone\n", stderr);
		return CLIENT_FAILED;
	}
	if (length > 1)
		fprintf(stderr, "qrexec-client-vm: %.*s\n", (int)length - 1, message + 1);
	return (unsigned char)message[0];
}

int client_main(int argc, char **argv)
{
	int first = open_options(argc, argv), pair[2], control;
	pid_t child;

	if (first < 0) {
		fputs("usage: qrexec-client-vm [options] [--] TARGET SERVICE[+ARG] "
		      "[LOCAL_COMMAND [ARGUMENT...]]\n", stderr);
		return CLIENT_FAILED;
	}
	signal(SIGPIPE, SIG_IGN);
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
		return CLIENT_FAILED;
	control = request_call(argv[first], argv[first + 1], pair[1]);
	if (control < 0)
		return CLIENT_FAILED;
	close(pair[1]);
	if (first + 2 < argc) {
		child = start_local(argv + first + 2, pair[0]);
		close(pair[0]);
		first = read_status(control);
	} else {
		child = pump(pair[0]);
		first = read_status(control);
		if (child > 0) /* it may still wait for input that nobody wants */
			kill(child, SIGKILL);
	}
	if (child > 0)
		waitpid(child, NULL, 0);
	return first;
}
