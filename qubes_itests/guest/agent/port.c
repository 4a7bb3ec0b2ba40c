/* The port, and the loop: frames from the host are taken apart, those to it collected. */
#include "agent.h"

#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>

enum { INPUT = 131072, OUTPUT = 262144, PAGE = 4096, WRITE_MAX = HEADER_SIZE + PAYLOAD_MAX };

static uint8_t input[INPUT], output[OUTPUT];
/* A frame that is whole must fit after what was moved to the front: see buffer_room. */
_Static_assert(INPUT >= 2 * (WRITE_MAX + PAGE), "the input does not hold a frame");
_Static_assert(OUTPUT >= 4 * WRITE_MAX, "the output does not hold two frames");
static struct {
	int fd, edges;
	bool readable;
	bool connected; /* HELLO came */
	bool answered;  /* and something was written since: the driver knows of the host */
	struct buffer in, out;
} port = {.in = {.bytes = input, .size = INPUT}, .out = {.bytes = output, .size = OUTPUT}};

bool port_connected(void)
{
	return port.connected;
}

void port_flush(void)
{
	size_t start = port.out.start;

	/* Bound by what the driver takes at once. */
	buffer_write(&port.out, port.fd, WRITE_MAX);
	port.answered = port.answered || port.out.start > start;
}

bool port_room(void)
{
	if (!buffer_room(&port.out, 2 * WRITE_MAX))
		port_flush();
	return buffer_room(&port.out, 2 * WRITE_MAX);
}

uint8_t *port_payload(void)
{
	return port.out.bytes + port.out.end + HEADER_SIZE;
}

void send_frame(enum frame_type type, uint8_t channel, uint32_t stream,
                const void *payload, size_t length)
{
	struct frame frame = {(uint8_t)type, channel, (uint16_t)length, stream};
	uint8_t *place = buffer_room(&port.out, HEADER_SIZE + length);

	/* Cannot be: who sends much has made room before (port_room), and the small frames of
	 * all streams together are less than that. A frame that is left out would let the streams of both
	 * sides differ for good. */
	if (!place) {
		errno = ENOBUFS;
		die("output");
	}
	memcpy(place, &frame, HEADER_SIZE);
	if (length && payload != place + HEADER_SIZE)
		memcpy(place + HEADER_SIZE, payload, length);
	port.out.end += HEADER_SIZE + length;
	if (port.out.end - port.out.start >= WRITE_MAX)
		port_flush();
}

void send_text(enum frame_type type, const char *format, ...)
{
	char text[2 * TEXT_MAX + 1];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	if (port.connected)
		send_frame(type, 0, 0, text, strlen(text));
}

static void disconnect(void)
{
	port.connected = port.answered = false;
	port.in.start = port.in.end = port.out.start = port.out.end = 0;
	streams_reset();
}

static void hello(const uint8_t *nonce)
{
	uint8_t answer[18] = {PROTOCOL_VERSION};

	streams_reset();
	/* What is left was for another host. Dropped after the streams, whose ends would add
	 * to it, and as a whole: cut between frames, or the new host could not read any. */
	port.out.start = port.out.end = 0;
	port.answered = false;
	port.connected = true;
	session_awaited = false; /* by another host */
	memcpy(answer + 2, nonce, 16);
	send_frame(READY, 0, 0, answer, sizeof answer);
	blocks_tell_again();
}

static void control_frame(const struct frame *frame, const uint8_t *payload,
                          struct strings strings)
{
	const char *problem = NULL, *first, *second;
	uint64_t now = 0;

	if (frame->type == HELLO) {
		hello(payload + 2);
		return;
	}
	if (frame->type == POWER_OFF)
		power_off(payload[0] == 1);
	memcpy(&now, payload, frame->type == CLOCK ? sizeof now : 0);
	if (frame->type == ENTER)
		problem = testing ? "there is no stage two here" : enter(strings);
	else if (frame->type == CLOCK)
		problem = set_clock(now);
	else if (frame->type == LEAVE)
		streams_leave(payload[0] == 1);
	else if (!(first = next_string(&strings)))
		problem = "nothing is named";
	else if (frame->type == DISK)
		problem = disk_check(first, (second = next_string(&strings)) ? second : "");
	else if (!db_set(first, frame->type == DB_WRITE ? next_string(&strings) : NULL))
		problem = "the database takes no such entry";
	if (problem)
		send_text(FAILED, "%s", problem);
	else if (frame->type != ENTER || !session_awaited)
		send_frame(DONE, 0, 0, NULL, 0);
}

/* Act on a whole frame; an answer names the rule that the host has broken. */
static const char *take_frame(const struct frame *frame, const uint8_t *payload)
{
	/* Of the host's types alone; what is not listed has no place, and is unknown. */
	enum place { NOWHERE, CONTROL, ON_STREAM };
	static const struct {
		enum place place;
		uint16_t least, most;
		bool strings;
	} rules[UINT8_MAX + 1] = {
		[HELLO] = {CONTROL, 18, 18, false},
		[ENTER] = {CONTROL, 1, PAYLOAD_MAX, true},
		[DB_WRITE] = {CONTROL, 0, PAYLOAD_MAX, true},
		[DB_REMOVE] = {CONTROL, 0, PAYLOAD_MAX, true},
		[POWER_OFF] = {CONTROL, 1, 1, false},
		[CLOCK] = {CONTROL, 8, 8, false},
		[DISK] = {CONTROL, 1, PAYLOAD_MAX, true},
		[LEAVE] = {CONTROL, 1, 1, false},
		[SPAWN] = {ON_STREAM, 1, PAYLOAD_MAX, true},
		[DATA] = {ON_STREAM, 1, PAYLOAD_MAX, false},
		[END_OF_FILE] = {ON_STREAM, 0, 0, false},
		[STOP] = {ON_STREAM, 0, 0, false},
		[CREDIT] = {ON_STREAM, 4, 4, false},
		[SIGNAL] = {ON_STREAM, 1, 1, false},
		[EXIT] = {ON_STREAM, 2, 2 + TEXT_MAX, false},
		[RESIZE] = {ON_STREAM, 4, 4, false},
	};
	uint8_t type = frame->type;
	const char *end = (const char *)payload + frame->length;

	if (rules[type].place != (frame->stream == 0 ? CONTROL : ON_STREAM))
		return "its type is unknown, or not for this stream";
	if (frame->length < rules[type].least || frame->length > rules[type].most)
		return "its length is wrong";
	if (rules[type].strings && frame->length && end[-1] != '\0')
		return "its strings have no end";
	if (rules[type].place == ON_STREAM)
		return stream_frame(frame, payload);
	control_frame(frame, payload, (struct strings){(const char *)payload, end});
	return NULL;
}

/* Take the next frame out of the input; false: not all of it is here. */
static bool next_frame(void)
{
	size_t held = port.in.end - port.in.start;
	const uint8_t *payload = port.in.bytes + port.in.start + HEADER_SIZE;
	const char *error = NULL;
	struct frame frame;

	if (held < HEADER_SIZE)
		return false;
	memcpy(&frame, payload - HEADER_SIZE, HEADER_SIZE);
	if (frame.length > PAYLOAD_MAX)
		error = "it is longer than allowed";
	else if (held < (size_t)HEADER_SIZE + frame.length)
		return false;
	else if (port.connected || frame.type == HELLO)
		error = take_frame(&frame, payload);
	port.in.start += (size_t)HEADER_SIZE + frame.length;
	if (error) {
		send_text(FAILED, "the host broke the protocol: frame of type %#x: %s",
		          frame.type, error);
		streams_reset();
		port.connected = false;
		port.in.start = port.in.end;
	}
	return true;
}

/* True: there is more to be done when there is room for the answers. */
static bool port_receive(void)
{
	/* The driver gives at most a page at a time: collect what there is. To the end, for
	 * epoll tells of an edge once, and never again of what was left. */
	while (port.readable && buffer_room(&port.in, PAGE)) {
		ssize_t length = read(port.fd, port.in.bytes + port.in.end,
		                      port.in.size - port.in.end);

		port.readable = length > 0;
		port.in.end += length > 0 ? (size_t)length : 0;
	}
	/* No frame is taken without room for its answer. This is the other half of the flow
	 * control: a host that does not read us is not read either, its writes fill the port,
	 * and it waits. (That it keeps reading us meanwhile is the host's part, or both would
	 * wait for ever: see _TOO_MUCH in link/connection.py.) */
	while (port_room())
		if (!next_frame())
			return port.readable;
	return true;
}

/* A port that says it has no host may be wrong, after a restore for instance, until
 * something could be written; before that there is nothing to be dropped either. */
static void port_event(void)
{
	struct epoll_event event;

	if (epoll_wait(port.edges, &event, 1, 0) != 1)
		return;
	port.readable = true;
	if (!(event.events & EPOLLHUP))
		return;
	if (port.answered || testing)
		disconnect();
	if (testing)
		exit(0);
}

static void port_open(int fd)
{
	/* Edges, for a port without a host is "ready" all the time. */
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET};

	port.fd = fd;
	port.edges = epoll_create1(EPOLL_CLOEXEC);
	/* A blocking write would spin in the driver until the host has taken it. */
	if (fcntl(fd, F_SETFL, O_NONBLOCK) != 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) != 0 ||
	    port.edges < 0 || epoll_ctl(port.edges, EPOLL_CTL_ADD, fd, &event) != 0)
		die("the port");
}

static int signals_open(void)
{
	struct sigaction action;
	sigset_t set;

	/* A signal that our parent ignored every command would ignore, too: to be ignored
	 * outlives execve. */
	for (int number = 1; number < NSIG; number++)
		if (sigaction(number, NULL, &action) == 0 && action.sa_handler == SIG_IGN)
			signal(number, SIG_DFL);
	/* Signals are read from a descriptor, between two events, and never interrupt: what a
	 * child's end changes is the very list of streams that is being walked through. They
	 * are blocked in children too, until become() unblocks them. */
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGALRM);
	if (getpid() == 1) {
		sigaddset(&set, SIGTERM);
		sigaddset(&set, SIGUSR1);
		sigaddset(&set, SIGUSR2);
	}
	sigprocmask(SIG_BLOCK, &set, NULL);
	/* A reader that went is an error of write(2). As process 1 we could not be killed by
	 * it, but where another init runs we would. */
	signal(SIGPIPE, SIG_IGN);
	return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void signals_ready(int fd)
{
	struct signalfd_siginfo info;
	int status;
	pid_t pid;

	while (read(fd, &info, sizeof info) == (ssize_t)sizeof info)
		if (info.ssi_signo == SIGALRM)
			session_overdue();
		else if (info.ssi_signo != SIGCHLD) /* as busybox tells its init */
			power_off(info.ssi_signo == SIGTERM);
	/* All that there are: several ends may have been one signal. As process 1 we get the
	 * orphans of all others, too, which would stay zombies. */
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		listener_reaped(pid);
		stream_reaped(pid, status);
	}
}

_Noreturn void run_loop(int port_fd, int disks, bool entered)
{
	enum { PORT, SIGNALS, CALLS, DISKS, MOUNTS, SESSION, STREAMS };
	static struct pollfd polled[STREAMS + STREAM_FDS];
	bool more = true;

	port_open(port_fd);
	for (int i = 0; i < STREAMS; i++)
		polled[i].events = POLLIN;
	polled[PORT].fd = port.edges;
	polled[SIGNALS].fd = signals_open();
	polled[CALLS].fd = calls_listen();
	polled[DISKS].fd = disks;
	polled[MOUNTS].events = POLLPRI;
	if (under_systemd)
		session_open();
	if (entered) {
		/* The host waits for the answer to ENTER, which init has left to this moment. */
		port.connected = true;
		send_frame(DONE, 0, 0, NULL, 0);
		port_flush();
	}
	for (;;) {
		/* Nothing but the port is heard before there is room for answers. */
		bool room = port_room();
		nfds_t count = room ? streams_collect(polled + STREAMS) : 0;
		int ready;

		polled[MOUNTS].fd = blocks_mounts();
		polled[SESSION].fd = session_events;
		ready = poll(polled, room ? STREAMS + count : 1, room && more ? 0 : -1);

		/* Without memory for its list it cannot wait, but the port goes on. */
		if (ready < 0 && errno != EINTR && errno != ENOMEM)
			die("poll");
		/* Streams before signals: of a command that has ended what it wrote last is then
		 * read first. What is left of it is asked for by source_drain(). */
		if (room && ready > 0) {
			if (polled[DISKS].revents)
				disks_ready();
			/* before streams, which may take the room */
			if (polled[DISKS].revents || polled[MOUNTS].revents)
				blocks_update();
			streams_ready(polled + STREAMS, count);
			if (polled[SIGNALS].revents)
				signals_ready(polled[SIGNALS].fd);
			if (polled[CALLS].revents)
				calls_ready(polled[CALLS].fd);
			if (polled[SESSION].revents)
				session_changed();
		}
		port_event();
		/* Frames first, then the sweep, which frees what has ended: an event of this turn
		 * must not find a stream that is no more. */
		more = port_receive();
		more = !streams_sweep() || more;
		port_flush();
	}
}
