/* qrexec-client-vm [options] [--] TARGET SERVICE[+ARG] [LOCAL_COMMAND [ARGUMENT…]] */
#include "agent.h"

#include <getopt.h>
#include <sys/prctl.h>
#include <sys/un.h>

enum { CLIENT_FAILED = 125 };

static const char *agent_socket;

/* The index of TARGET, or -1. */
static int parse_options(int argc, char **argv)
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

static bool request_call(char *target, char *service, const int fds[CALL_FDS])
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	union {
		char space[CMSG_SPACE(CALL_FDS * sizeof(int))];
		struct cmsghdr header;
	} control = {.header = {.cmsg_len = CMSG_LEN(CALL_FDS * sizeof(int)),
	                        .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
	struct iovec parts[2] = {{target, strlen(target) + 1}, {service, strlen(service) + 1}};
	struct msghdr message = {
		.msg_name = &address, .msg_namelen = sizeof address, .msg_iov = parts,
		.msg_iovlen = 2, .msg_control = &control, .msg_controllen = sizeof control};
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	memcpy(CMSG_DATA(&control.header), fds, CALL_FDS * sizeof(int));
	snprintf(address.sun_path, sizeof address.sun_path, "%s",
	         agent_socket ? agent_socket : in_root(SOCKET_PATH));
	if (sendmsg(fd, &message, MSG_NOSIGNAL) >= 0)
		return true;
	fprintf(stderr, "qrexec-client-vm: %s: %s\n", address.sun_path, strerror(errno));
	return false;
}

static void save_fd(int fd, const char *name)
{
	char number[16];

	snprintf(number, sizeof number, "%d", dup(fd));
	setenv(name, number, 1);
}

/* The command's stdio is the call; what was ours it finds as SAVED_FD_0 and _1. */
static _Noreturn void run_local(char **argv, int input, int output)
{
	save_fd(STDIN_FILENO, "SAVED_FD_0");
	save_fd(STDOUT_FILENO, "SAVED_FD_1");
	if (dup2(input, STDIN_FILENO) >= 0 && dup2(output, STDOUT_FILENO) >= 0) {
		signal(SIGPIPE, SIG_DFL);
		execvp(argv[0], argv);
	}
	fprintf(stderr, "qrexec-client-vm: %s: %s\n", argv[0], strerror(errno));
	_exit(NOT_FOUND);
}

/* Until either end is gone. */
static void copy(int from, int to)
{
	static uint8_t bytes[65536];
	ssize_t length;

	while ((length = read(from, bytes, sizeof bytes)) > 0) {
		struct buffer buffer = {bytes, sizeof bytes, 0, (size_t)length};

		if (!buffer_write(&buffer, to, sizeof bytes) || buffer.start < buffer.end)
			break;
	}
	close(from);
	close(to);
}

static int read_status(int fd)
{
	char message[1 + TEXT_MAX];
	ssize_t length = read(fd, message, sizeof message);

	if (length < 1) {
		fputs("qrexec-client-vm: the agent has gone\n", stderr);
		return CLIENT_FAILED;
	}
	if (length > 1)
		fprintf(stderr, "qrexec-client-vm: %.*s\n", (int)length - 1, message + 1);
	return (unsigned char)message[0];
}

/* Input is copied by a child, so that a stuck reader of either end holds up one way. */
static pid_t start_child(char **local, int input, int output)
{
	pid_t parent = getpid(), child = fork();

	if (child != 0)
		return child;
	if (*local)
		run_local(local, input, output);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	close(input);
	if (getppid() == parent)
		copy(STDIN_FILENO, output);
	_exit(0);
}

int client_main(int argc, char **argv)
{
	int first = parse_options(argc, argv), in[2], out[2], status[2], result;
	pid_t child;

	if (first < 0) {
		fputs("usage: qrexec-client-vm [options] [--] TARGET SERVICE[+ARG] "
		      "[LOCAL_COMMAND [ARGUMENT...]]\n", stderr);
		return CLIENT_FAILED;
	}
	signal(SIGPIPE, SIG_IGN);
	if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0 ||
	    pipe2(status, O_CLOEXEC) != 0 ||
	    !request_call(argv[first], argv[first + 1], (int[]){out[0], in[1], status[1]}))
		return CLIENT_FAILED;
	/* Its ends are the agent's now. */
	close(out[0]);
	close(in[1]);
	close(status[1]);
	child = start_child(argv + first + 2, in[0], out[1]);
	close(out[1]);
	if (argv[first + 2])
		close(in[0]);
	else
		copy(in[0], STDOUT_FILENO);
	result = read_status(status[0]);
	if (child > 0 && !argv[first + 2]) /* it may still wait for input that nobody wants */
		kill(child, SIGKILL);
	if (child > 0)
		waitpid(child, NULL, 0);
	return result;
}
