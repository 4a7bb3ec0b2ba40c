/* The agent's socket in the guest: where qrexec-client-vm asks for calls. */
#include "agent.h"

#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static struct watch listener = {.fd = -1};
static struct watch clients[STREAMS_MAX]; /* that have not asked yet */

static void refuse(int client, const char *text)
{
	char message[1 + TEXT_MAX];
	int length = snprintf(message, sizeof message, "%c%s", REFUSED, text);

	send(client, message, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL);
	close(client);
}

/* The one message of a client: target and service, and its end of a socketpair. */
static ssize_t receive_request(int client, char *request, size_t size, int *stdio)
{
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = {request, size};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1,
	                         .msg_control = &control, .msg_controllen = sizeof control};
	ssize_t length = recvmsg(client, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	const struct cmsghdr *header = length > 0 ? CMSG_FIRSTHDR(&message) : NULL;

	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS &&
	    header->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(stdio, CMSG_DATA(header), sizeof(int));
	return message.msg_flags & MSG_TRUNC ? -1 : length;
}

static bool request_valid(struct strings strings, int stdio)
{
	const char *target, *service;
	int type = 0;
	socklen_t size = sizeof type;

	if (strings.next == strings.end || !strings_valid(&strings))
		return false;
	target = next_string(&strings);
	service = next_string(&strings);
	return service && *target && strlen(target) < NAME_LIMIT && *service &&
	       strlen(service) < NAME_LIMIT && strings.next == strings.end &&
	       getsockopt(stdio, SOL_SOCKET, SO_TYPE, &type, &size) == 0 &&
	       type == SOCK_STREAM;
}

static void client_ready(struct watch *watch, uint32_t events)
{
	struct ucred peer = {0};
	socklen_t size = sizeof peer;
	char text[2 * NAME_LIMIT];
	struct user user;
	int client = watch->fd, stdio = -1;
	struct stream *slot = call_slot();
	struct strings request = {text, text};
	ssize_t length = receive_request(client, text, sizeof text, &stdio);

	(void)events;
	watch_events(watch, 0);
	watch->fd = -1;
	request.end += length > 0 ? length : 0;
	getsockopt(client, SOL_SOCKET, SO_PEERCRED, &peer, &size);
	if (!request_valid(request, stdio) || !find_user(NULL, peer.uid, &user) ||
	    strlen(user.name) >= NAME_LIMIT)
		refuse(client, "the request is not valid");
	else if (!connected || !slot)
		refuse(client, connected ? "too many calls at once" : "no host is connected");
	else {
		call_start(slot, client, stdio, request, user.name);
		return;
	}
	if (stdio >= 0)
		close(stdio);
}

static void listener_ready(struct watch *watch, uint32_t events)
{
	int client = accept4(watch->fd, NULL, NULL, SOCK_CLOEXEC);

	(void)events;
	if (client < 0)
		return;
	for (size_t i = 0; i < STREAMS_MAX; i++)
		if (clients[i].fd < 0) {
			watch_open(&clients[i], client, EPOLLIN, client_ready);
			return;
		}
	refuse(client, "too many clients at once");
}

void calls_listen(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	mkdir(in_root("/run"), 0755);
	mkdir(in_root("/run/qubes"), 0755);
	snprintf(address.sun_path, sizeof address.sun_path, "%s", in_root(SOCKET_PATH));
	unlink(address.sun_path);
	if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
	    chmod(address.sun_path, 0666) != 0 || listen(fd, STREAMS_MAX) != 0)
		die(SOCKET_PATH);
	for (size_t i = 0; i < STREAMS_MAX; i++)
		clients[i].fd = -1;
	watch_open(&listener, fd, EPOLLIN, listener_ready);
}
