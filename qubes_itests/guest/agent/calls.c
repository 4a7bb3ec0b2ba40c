/* The agent's socket in the guest: where qrexec-client-vm asks for calls. */
#include "agent.h"

#include <sys/un.h>

void tell_client(int status, uint8_t value, const char *text)
{
	uint8_t message[1 + TEXT_MAX] = {value};
	size_t length = strnlen(text, TEXT_MAX);
	struct buffer buffer = {message, sizeof message, 0, 1 + length};

	memcpy(message + 1, text, length);
	buffer_write(&buffer, status, sizeof message);
	close(status);
}

/* Target and service, and nothing else. */
static bool request_valid(struct strings strings)
{
	bool whole = strings.next < strings.end && strings.end[-1] == '\0';
	const char *target = whole ? next_string(&strings) : NULL,
	           *service = whole ? next_string(&strings) : NULL;

	return service && *target && strlen(target) < NAME_LIMIT && *service &&
	       strlen(service) < NAME_LIMIT && strings.next == strings.end;
}

/* Pipes or sockets can be waited for, and do not block. */
static bool fds_valid(const int *fds, size_t count)
{
	struct stat status;
	bool valid = count == CALL_FDS;

	for (size_t i = 0; i < count; i++)
		valid = valid && fstat(fds[i], &status) == 0 &&
		        (S_ISFIFO(status.st_mode) || S_ISSOCK(status.st_mode)) &&
		        fcntl(fds[i], F_SETFL, O_NONBLOCK) == 0;
	return valid;
}

/* One datagram: strings, descriptors, and who sent them; the number of descriptors. */
static size_t receive(int socket, struct iovec *text, int *fds, struct ucred *sender)
{
	union {
		char space[CMSG_SPACE(sizeof *sender) + CMSG_SPACE(CALL_FDS * sizeof *fds)];
		struct cmsghdr align;
	} control;
	struct msghdr message = {.msg_iov = text, .msg_iovlen = 1, .msg_control = &control,
	                         .msg_controllen = sizeof control};
	/* Closed on exec from the first moment on: a command that is spawned in between would
	 * keep the call's pipes open. */
	ssize_t length = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	bool whole = length >= 0 && !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
	size_t size = 0;

	text->iov_len = whole ? (size_t)length : 0;
	if (length < 0)
		return 0;
	for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part;
	     part = CMSG_NXTHDR(&message, part)) {
		if (part->cmsg_type == SCM_CREDENTIALS)
			memcpy(sender, CMSG_DATA(part), sizeof *sender);
		if (part->cmsg_type != SCM_RIGHTS)
			continue;
		size = part->cmsg_len - CMSG_LEN(0);
		memcpy(fds, CMSG_DATA(part), size);
	}
	return size / sizeof *fds;
}

void calls_ready(int socket)
{
	char text[2 * NAME_LIMIT];
	struct iovec part = {text, sizeof text};
	/* The kernel's word, by SO_PASSCRED: who calls is not what the datagram says. */
	struct ucred sender = {.uid = (uid_t)-1};
	int fds[CALL_FDS + 1]; /* alignment may leave space for one more */
	size_t count = receive(socket, &part, fds, &sender);
	struct strings request = {text, text + part.iov_len};
	struct passwd *user = count ? find_user(NULL, sender.uid) : NULL;
	const char *problem = "the request is not valid", *first, *second;

	if (count == 0 && part.iov_len > 0 && text[part.iov_len - 1] == '\0' &&
	    (first = next_string(&request)) && (second = next_string(&request)) &&
	    strcmp(first, USE_STDIN) == 0)
		stream_use_stdin(atoi(second), sender.pid, sender.uid);
	if (user && strlen(user->pw_name) < NAME_LIMIT && fds_valid(fds, count) &&
	    request_valid(request))
		problem = call_open(request, user->pw_name, sender.pid, fds);
	if (problem && count == CALL_FDS)
		tell_client(fds[--count], REFUSED, problem);
	while (problem && count > 0)
		close(fds[--count]);
}

int calls_listen(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), on = 1;

	mkdir(in_root("/run"), 0755);
	mkdir(in_root("/run/qubes"), 0755);
	snprintf(address.sun_path, sizeof address.sun_path, "%s", in_root(SOCKET_PATH));
	unlink(address.sun_path);
	if (setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) != 0 ||
	    bind(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
	    chmod(address.sun_path, 0666) != 0)
		die(SOCKET_PATH);
	return fd;
}
