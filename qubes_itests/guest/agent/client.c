/* qrexec-client-vm [options] [--] TARGET SERVICE[+ARG] [LOCAL_COMMAND [ARGUMENT…]] */
#include "agent.h"

#include <getopt.h>
#include <pthread.h>
#include <sys/un.h>

enum { CLIENT_FAILED = 125, WRONG_USAGE = 2 };

static const char usage[] =
	"usage: qrexec-client-vm [options] [--] TARGET SERVICE[+ARG] [LOCAL_COMMAND [ARGUMENT...]]\n"
	"\n"
	"Call a service of another VM. It is connected to our standard input and output, or to\n"
	"those of a local command, which has ours as descriptors $SAVED_FD_0 and $SAVED_FD_1.\n"
	"\n"
	"  -p, --prefix-data=DATA   what the service reads before anything else\n"
	"  --use-stdin-socket       descriptor 0 is a stream socket, and takes the output too\n"
	"  -t, --filter-escape-chars-stdout\n"
	"                           replace bytes of the output that could command a terminal\n"
	"                           by _, as is done without this if it goes to a terminal\n"
	"  --no-filter-escape-chars-stdout\n"
	"                           never replace any\n"
	"  -T, --filter-escape-chars-stderr, --no-filter-escape-chars-stderr\n"
	"                           taken for compatibility: errors of services stay there\n"
	"  --buffer-size=BYTES, -s, --source-qube=NAME\n"
	"                           taken for compatibility\n"
	"  -a, --agent-socket=PATH  where the agent is asked\n"
	"  -h, --help               show this\n";

static const char *agent_socket, *prefix;
static bool filter, stdin_socket;

static int misused(const char *what)
{
	fprintf(stderr, "qrexec-client-vm: %s\n%s", what, usage);
	return -1;
}

static bool is_stream_socket(int fd)
{
	int type = 0;
	socklen_t size = sizeof type;

	return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM;
}

/* The index of TARGET, 0 when help was asked for, or -1. */
static int parse_options(int argc, char **argv)
{
	enum { NO_FILTER = 256, STDIN_SOCKET, IGNORED };
	static const struct option options[] = {
		{"buffer-size", required_argument, NULL, IGNORED},
		{"filter-escape-chars-stdout", no_argument, NULL, 't'},
		{"filter-escape-chars-stderr", no_argument, NULL, 'T'},
		{"no-filter-escape-chars-stdout", no_argument, NULL, NO_FILTER},
		{"no-filter-escape-chars-stderr", no_argument, NULL, IGNORED},
		{"agent-socket", required_argument, NULL, 'a'},
		{"prefix-data", required_argument, NULL, 'p'},
		{"use-stdin-socket", no_argument, NULL, STDIN_SOCKET},
		{"source-qube", required_argument, NULL, 's'},
		{"help", no_argument, NULL, 'h'},
		{NULL, 0, NULL, 0},
	};
	int option;

	filter = isatty(STDOUT_FILENO);
	while ((option = getopt_long(argc, argv, "+tTa:p:s:h", options, NULL)) != -1) {
		if (option == '?')
			return misused("there is no such option, or its argument is missing");
		if (option == 'h')
			return 0;
		if (option == 'p' && prefix)
			return misused("--prefix-data can be given once only");
		if (option == 'p')
			prefix = optarg;
		if (option == 'a')
			agent_socket = optarg;
		if (option == 't' || option == NO_FILTER)
			filter = option == 't';
		stdin_socket = stdin_socket || option == STDIN_SOCKET;
	}
	if (argc - optind < 2)
		return misused("expected TARGET and SERVICE");
	if (stdin_socket && argc - optind > 2)
		return misused("expected one of --use-stdin-socket and LOCAL_COMMAND, got both");
	if (stdin_socket && !is_stream_socket(STDIN_FILENO))
		return misused("--use-stdin-socket: descriptor 0 is no stream socket");
	for (char *mark = argv[optind]; (mark = strchr(mark, '$'));)
		*mark = '@'; /* as keywords are written today */
	return optind;
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
	snprintf(address.sun_path, sizeof address.sun_path, "%s", agent_socket);
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
	char number[16];

	save_fd(STDIN_FILENO, "SAVED_FD_0");
	save_fd(STDOUT_FILENO, "SAVED_FD_1");
	snprintf(number, sizeof number, "%d", (int)getppid());
	setenv("QREXEC_AGENT_PID", number, 1);
	if (dup2(input, STDIN_FILENO) >= 0 && dup2(output, STDOUT_FILENO) >= 0) {
		signal(SIGPIPE, SIG_DFL);
		execvp(argv[0], argv);
	}
	fprintf(stderr, "qrexec-client-vm: %s: %s\n", argv[0], strerror(errno));
	_exit(NOT_FOUND);
}

static void replace_unprintable(uint8_t *bytes, ssize_t length)
{
	for (ssize_t i = 0; i < length; i++)
		if ((bytes[i] < ' ' && !memchr("\a\b\t\n\r", bytes[i], 5)) || bytes[i] > '~')
			bytes[i] = '_';
}

/* Until either end is gone. */
static void copy(int from, int to, bool filtered)
{
	static uint8_t space[2][65536]; /* for each way: two threads copy */
	uint8_t *bytes = space[from == STDIN_FILENO];
	ssize_t length;

	while ((length = read(from, bytes, sizeof space[0])) > 0) {
		struct buffer buffer = {bytes, sizeof space[0], 0, (size_t)length};

		if (filtered)
			replace_unprintable(bytes, length);
		if (!buffer_write(&buffer, to, sizeof space[0]) || buffer.start < buffer.end)
			break;
	}
	/* Others hold a socket, too, and the other way may read from it. */
	if (stdin_socket)
		shutdown(to, SHUT_WR);
	else
		close(to);
}

static int output; /* the call's input, which we write */

/* Our stdin stays open: who writes there shall not see its end before the call's. */
static void *copy_input(void *nothing)
{
	copy(STDIN_FILENO, output, false);
	return nothing;
}

/* The local command has its output on its stdin. */
static void on_signal(int number)
{
	int error = errno;

	(void)number;
	tell_agent(agent_socket, USE_STDIN, getpid());
	errno = error;
}

static int read_status(int fd)
{
	char message[1 + TEXT_MAX];
	ssize_t length;

	while ((length = read(fd, message, sizeof message)) < 0 && errno == EINTR)
		;

	if (length < 1) {
		fputs("qrexec-client-vm: the agent has gone\n", stderr);
		return CLIENT_FAILED;
	}
	if (length > 1)
		fprintf(stderr, "qrexec-client-vm: %.*s\n", (int)length - 1, message + 1);
	return (unsigned char)message[0];
}

/* Input is copied beside the output, so that a stuck reader of either end holds up one
 * way. By a thread: under emulation a fork takes five times as long. It ends with us. */
static bool start_input(void)
{
	/* Its stack is here: a mapping of its own would have to be made. */
	static _Alignas(16) uint8_t stack[65536];
	pthread_attr_t attributes;
	pthread_t thread;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setstack(&attributes, stack, sizeof stack);
	error = pthread_create(&thread, &attributes, copy_input, NULL);
	if (error != 0)
		fprintf(stderr, "qrexec-client-vm: input: %s\n", strerror(error));
	return error == 0;
}

/* What the service reads first. The agent reads as much as an argument may hold before
 * anybody else does. */
static void write_prefix(void)
{
	size_t length = prefix ? strlen(prefix) : 0;

	for (ssize_t done = 0; length > 0 && done >= 0; length -= (size_t)done, prefix += done)
		if ((done = write(output, prefix, length)) < 0)
			break; /* the status will say why */
}

int client_main(int argc, char **argv)
{
	int first = parse_options(argc, argv), in[2], out[2], status[2], result;
	pid_t local = 0;

	if (first == 0)
		return fputs(usage, stdout) < 0;
	if (first < 0)
		return WRONG_USAGE;
	signal(SIGPIPE, SIG_IGN);
	signal(SIGUSR1, on_signal);
	if (!agent_socket)
		agent_socket = in_root(SOCKET_PATH);
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, in) != 0 ||
	    socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, out) != 0 ||
	    pipe2(status, O_CLOEXEC) != 0 ||
	    !request_call(argv[first], argv[first + 1], (int[]){out[0], in[1], status[1]}))
		return CLIENT_FAILED;
	/* Its ends are the agent's now. */
	close(out[0]);
	close(in[1]);
	close(status[1]);
	output = out[1];
	write_prefix();
	if (argv[first + 2]) {
		local = fork();
		if (local == 0)
			run_local(argv + first + 2, in[0], output);
		close(output);
	} else {
		if (!start_input())
			return CLIENT_FAILED;
		copy(in[0], stdin_socket ? STDIN_FILENO : STDOUT_FILENO, filter);
	}
	/* That nobody reads the call's output any more. */
	close(in[0]);
	result = read_status(status[0]);
	if (local > 0)
		waitpid(local, NULL, 0);
	return result;
}
