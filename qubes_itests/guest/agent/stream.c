/* Streams: commands, services and terminals that the host runs here, calls that go out.
 *
 * A stream has up to three channels, numbered as in the protocol: sinks, which the
 * agent writes for the host, and sources, which it reads for the host. */
#include "agent.h"

#include <sys/ioctl.h>

enum {
	CHANNELS = 3,
	GIVE_BACK = WINDOW / 4,
	CREDIT_MAX = 4 * WINDOW,
	PAGE = 4096,
	DESCRIPTOR_MAX = 3 * NAME_LIMIT, /* what a socket is told before all input */
	/* Twice of what is held at most: that can always be moved to the front. */
	SPACE = 2 * (WINDOW + DESCRIPTOR_MAX),
	NO_PROCESS = -1,
	TERMINAL_HOLDS = 65536 + 4096, /* at most: what the kernel has room for */
};
static const uint32_t first_guest = 0x80000000u;

/* The payload of EXIT, and a NUL. */
struct result {
	uint8_t kind, value;
	char text[TEXT_MAX + 1];
};
_Static_assert(offsetof(struct result, value) == 1 && offsetof(struct result, text) == 2 &&
               sizeof(struct result) == 2 + TEXT_MAX + 1, "EXIT is laid out otherwise");

struct channel {
	int fd; /* -1: closed */
	uint8_t number;
	bool sink;
	uint32_t credit;      /* of the sender */
	int last;             /* source: bytes still to be sent when the command has ended */
	bool finished;        /* sink: the host sent EOF */
	uint32_t taken;       /* sink: credit still to be given back */
	struct buffer buffer; /* sink: what its reader has not taken yet */
	struct stream *stream;
};

struct stream {
	struct stream *next;
	uint32_t id;
	pid_t pid;  /* 0: a call; NO_PROCESS: not started, or a socket serves */
	int status; /* a call's client waits there */
	bool ended;
	bool terminal; /* its input and its output are one, and have one end */
	bool ends_with[2]; /* a socket's stream, with its input or its output */
	int spare;         /* of a sink that was shut: its socket, which may still be read */
	uid_t uid;         /* whose service it is */
	pid_t caller;      /* a call's client */
	int error;         /* why a socket could not be read or written */
	struct result result;
	uint8_t *space; /* of its sink's buffer */
	struct channel channels[CHANNELS];
};

static struct stream *streams;
/* Commands of a connection that is no more, with all that they have open here: they wait
 * for input, or for room for their output, as they did. Nothing is read or written. */
static struct stream *left;
static bool leaves;
static unsigned int stream_count[2]; /* commands, calls */
static uint32_t last_host, last_guest = 0x80000000u;

static void channel_open(struct stream *stream, int number, int fd, bool sink)
{
	stream->channels[number] = (struct channel){
		.fd = fd, .number = (uint8_t)number, .sink = sink, .credit = WINDOW,
		.stream = stream};
	if (sink)
		stream->channels[number].buffer =
			(struct buffer){.bytes = stream->space, .size = SPACE};
}

static void channel_close(struct channel *channel)
{
	static uint8_t unread[PAGE];
	bool is_socket;

	if (channel->fd < 0)
		return;
	/* The other end of a socket shall see a closed pipe, not a reset, as it would if
	 * something were left unread; and the other channel may have the same socket. */
	/* A half-close: what is the sink of one channel is often the source of the other, and
	 * close(2) of our descriptor alone would tell the peer of nothing. */
	is_socket = shutdown(channel->fd, channel->sink ? SHUT_WR : SHUT_RD) == 0;
	while (is_socket && !channel->sink && read(channel->fd, unread, sizeof unread) > 0)
		;
	/* Kept for `use-stdin`, which may come after the input has ended: then the output is
	 * on this very socket. */
	if (is_socket && channel->sink && channel->stream->spare < 0 &&
	    channel->stream->pid != NO_PROCESS)
		channel->stream->spare = channel->fd;
	else
		close(channel->fd);
	channel->fd = -1;
	if (!channel->sink)
		return;
	free(channel->stream->space);
	channel->stream->space = NULL;
	channel->buffer = (struct buffer){0};
}

static void tell(const struct channel *channel, enum frame_type type,
                 const void *payload, size_t length)
{
	send_frame(type, channel->number, channel->stream->id, payload, length);
}

/* A socket says once what is wrong; to be hung up on is nothing of that kind. */
static void note_error(struct stream *stream)
{
	if (!stream->error && errno != EPIPE && errno != ECONNRESET)
		stream->error = errno;
}

/* Sources. */

static void source_end(struct channel *source)
{
	channel_close(source);
	tell(source, END_OF_FILE, NULL, 0);
}

static bool source_drained(const struct channel *source)
{
	return source->stream->ended &&
	       (source->last == 0 || (source->stream->terminal && terminal_empty(source->fd)));
}

static void source_ready(struct channel *source)
{
	bool ended = source->stream->ended;
	size_t limit = source->credit < PAYLOAD_MAX ? source->credit : PAYLOAD_MAX;
	ssize_t length;

	if (!port_room())
		return;
	if (ended && (size_t)source->last < limit)
		limit = (size_t)source->last;
	/* Straight into the port's buffer, behind the place of a header, and no more than
	 * there is credit for: nothing that was read ever waits here. */
	length = read(source->fd, port_payload(), limit);
	if (length > 0) {
		tell(source, DATA, port_payload(), (size_t)length);
		source->credit -= (uint32_t)length;
		source->last -= ended ? (int)length : 0;
	}
	if (length > 0 ? source_drained(source)
	               : length == 0 || (errno != EAGAIN && errno != EINTR)) {
		if (length < 0)
			note_error(source->stream);
		source_end(source);
	}
}

/* Its command has ended: what it holds now is sent, others are not waited for. */
static void source_drain(struct channel *source)
{
	if (source->fd < 0)
		return;
	/* So much and no more, or a child that the command left behind, and that writes on,
	 * would keep EXIT from being sent. */
	if (source->stream->terminal)
		source->last = TERMINAL_HOLDS;
	else if (ioctl(source->fd, FIONREAD, &source->last) != 0)
		source->last = 0;
	if (source_drained(source))
		source_end(source);
}

/* Sinks. */

static size_t held(const struct channel *sink)
{
	return sink->buffer.end - sink->buffer.start;
}

static void sink_stop(struct channel *sink)
{
	channel_close(sink);
	/* After EOF of the host there is nothing more to be stopped; after the command's end
	 * EXIT says it. */
	if (!sink->stream->ended && !sink->finished)
		tell(sink, STOP, NULL, 0);
}

static void sink_flush(struct channel *sink)
{
	size_t before = held(sink);

	if (!buffer_write(&sink->buffer, sink->fd, WINDOW)) {
		note_error(sink->stream);
		sink_stop(sink);
		return;
	}
	/* Credit goes back for what the reader has taken, not for what has arrived: so much
	 * is in `buffer` at most, whoever does not read. Together, as each is a frame. */
	sink->taken += (uint32_t)(before - held(sink));
	if (sink->finished && !held(sink))
		channel_close(sink);
	if (sink->taken < GIVE_BACK || sink->finished)
		return;
	tell(sink, CREDIT, &sink->taken, 4);
	sink->credit += sink->taken;
	sink->taken = 0;
}

static const char *sink_data(struct channel *sink, const uint8_t *bytes, size_t length)
{
	if (sink->finished || length > sink->credit)
		return "DATA after EOF, or more of it than credit";
	sink->credit -= (uint32_t)length;
	/* Closed, and STOP may still be on its way to the host: dropped, and no credit for
	 * it, so it ceases. */
	if (sink->fd < 0)
		return NULL;
	memcpy(buffer_room(&sink->buffer, length), bytes, length);
	sink->buffer.end += length;
	sink_flush(sink);
	return NULL;
}

static const char *sink_finish(struct channel *sink)
{
	if (sink->finished)
		return "a second EOF";
	sink->finished = true;
	if (!held(sink))
		channel_close(sink);
	return NULL;
}

/* Opening and ending. */

/* NULL: there is no memory for it. All that it needs is allocated here, so that memory
 * which is short refuses a new stream, and ends none that is open. */
static struct stream *stream_new(uint32_t id, pid_t pid)
{
	struct stream *stream = calloc(1, sizeof *stream);

	if (!stream || !(stream->space = malloc(SPACE))) {
		free(stream);
		return NULL;
	}
	stream->next = streams;
	streams = stream;
	stream->id = id;
	stream->pid = pid;
	stream->status = stream->spare = -1;
	stream_count[pid == 0]++;
	for (int i = 0; i < CHANNELS; i++)
		channel_open(stream, i, -1, pid == 0 ? i == 1 : i == 0);
	return stream;
}

static struct result result_of(enum exit_kind kind, int value, const char *text)
{
	struct result result = {(uint8_t)kind, (uint8_t)value, ""};

	snprintf(result.text, sizeof result.text, "%s", text);
	return result;
}

static void stream_end(struct stream *stream, enum exit_kind kind, int value,
                       const char *text)
{
	stream->ended = true;
	stream->result = result_of(kind, value, text);
}

static void tell_end(uint32_t id, const struct result *result)
{
	send_frame(EXIT, 0, id, result, 2 + strlen(result->text));
}

/* Output is a stream socket, as is a service's input; the others are pipes. ours[i] is
 * the agent's end of theirs[i].
 *
 * A pipe would stop the agent: cat(1) of busybox splices, which holds the lock of the
 * pipe that it writes to while it waits for input. Where that is a call's socket, the
 * input has to come from the agent, who hangs in read(2) of that pipe. */
static bool stdio_open(bool service, int ours[CHANNELS], int theirs[CHANNELS])
{
	for (int i = 0; i < CHANNELS; i++) {
		int pair[2], reader = i == 0; /* which of a pipe's ends is theirs */
		bool is_socket = i == 1 || (service && i == 0);

		if (is_socket ? socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0
		              : pipe2(pair, O_CLOEXEC) != 0)
			return false;
		ours[i] = pair[reader];
		theirs[i] = pair[!reader];
		fcntl(ours[i], F_SETFL, O_NONBLOCK);
		fcntl(ours[i], F_SETPIPE_SZ, WINDOW);
	}
	return true;
}

/* A terminal's input and output are both its master; it has no third channel. */
static bool terminal_stdio(const char *size, int ours[CHANNELS], int theirs[CHANNELS])
{
	ours[0] = terminal_open(size, &theirs[0]);
	if (ours[0] < 0)
		return false;
	ours[1] = fcntl(ours[0], F_DUPFD_CLOEXEC, 0);
	theirs[1] = fcntl(theirs[0], F_DUPFD_CLOEXEC, 0);
	theirs[2] = fcntl(theirs[0], F_DUPFD_CLOEXEC, 0);
	return ours[1] >= 0 && theirs[1] >= 0 && theirs[2] >= 0;
}

/* service NULL: a command; on a terminal of that size, unless that is NULL. */
static void process_open(struct stream *stream, struct strings request,
                         const struct service *service, const char *size)
{
	int ours[CHANNELS] = {-1, -1, -1}, theirs[CHANNELS] = {-1, -1, -1};
	struct failure failure = {REFUSED, ""};

	stream->terminal = size != NULL;
	if (size ? !terminal_stdio(size, ours, theirs)
	         : !stdio_open(service != NULL, ours, theirs))
		snprintf(failure.text, sizeof failure.text, "it gets no %s: %s",
		         size ? "terminal" : "input and output", strerror(errno));
	else
		stream->pid = spawn(request, service, theirs, &stream->uid, &failure);
	/* The command's ends are its own now. One that stayed open here would keep its output
	 * from ever ending, and its input from breaking when it closes it. */
	for (int i = 0; i < CHANNELS; i++) {
		close(theirs[i]);
		if (stream->pid > 0)
			channel_open(stream, i, ours[i], i == 0);
		else
			close(ours[i]);
	}
	if (stream->pid < 0)
		stream_end(stream, NOT_STARTED, failure.value, failure.text);
}

/* A socket serves: it is told who calls what, and has the call's input and output. */
static void server_open(struct stream *stream, struct service *service, const char *name,
                        const char *source)
{
	struct failure failure;
	struct channel *sink = &stream->channels[0];
	int fd = service_connect(service, name, &failure), copy = -1;

	if (fd >= 0 && (copy = fcntl(fd, F_DUPFD_CLOEXEC, 0)) < 0) {
		close(fd);
		failure = (struct failure){REFUSED, "there are no more descriptors"};
	}
	if (copy < 0) {
		stream_end(stream, NOT_STARTED, failure.value, failure.text);
		return;
	}
	stream->ends_with[0] = service->ends_with_client;
	stream->ends_with[1] = service->ends_with_service;
	channel_open(stream, 0, fd, true);
	channel_open(stream, 1, copy, false);
	if (service->bare)
		return;
	/* Beside the window: the host knows nothing of it. */
	sink->buffer.end = (size_t)snprintf((char *)sink->buffer.bytes, DESCRIPTOR_MAX,
	                                    "%s %.*s", name, NAME_LIMIT, source) + 1;
	sink_flush(sink);
	sink->taken = 0;
}

/* Whether all is done of a socket that serves; a program says so by ending. */
static void server_check(struct stream *stream)
{
	bool in = stream->channels[0].fd < 0, out = stream->channels[1].fd < 0;

	if (stream->pid != NO_PROCESS || stream->ended ||
	    !((in && out) || (in && stream->ends_with[0]) || (out && stream->ends_with[1])))
		return;
	channel_close(&stream->channels[0]);
	channel_close(&stream->channels[1]);
	if (stream->error)
		stream_end(stream, NOT_STARTED, REFUSED, strerror(stream->error));
	else
		stream_end(stream, EXITED, 0, "");
}

/* When the host has closed the input, or either side the output, a terminal is hung up:
 * the kernel sends SIGHUP to its session when nobody holds the master any more. An input
 * that nobody in the guest has open says nothing: there may be output yet to be sent. */
static void terminal_check(struct stream *stream)
{
	struct channel *sink = &stream->channels[0], *source = &stream->channels[1];

	if (!stream->terminal || stream->ended)
		return;
	if (sink->fd < 0 && sink->finished && source->fd >= 0)
		source_end(source);
	if (source->fd < 0 && sink->fd >= 0)
		sink_stop(sink);
}

static void command_open(uint32_t id, struct strings request)
{
	static struct service service;
	bool room = stream_count[0] < STREAMS_MAX;
	struct stream *stream = room ? stream_new(id, NO_PROCESS) : NULL;
	struct strings rest = request;
	const char *kind = next_string(&rest), *name, *source;
	struct failure failure;

	if (!stream) {
		struct result result = result_of(NOT_STARTED, REFUSED,
		                                 room ? "there is no memory for it" : "too many at once");

		tell_end(id, &result);
		return;
	}
	next_string(&rest);
	name = next_string(&rest);
	source = next_string(&rest);
	if (!source || strcmp(kind, "service") != 0)
		process_open(stream, request, NULL,
		             source && strcmp(kind, "terminal") == 0 ? source : NULL);
	else if (!service_find(name, &service, &failure))
		stream_end(stream, NOT_STARTED, failure.value, failure.text);
	else if (service.kind == PROGRAM)
		process_open(stream, request, &service, NULL);
	else
		server_open(stream, &service, name, source);
}

const char *call_open(struct strings request, const char *user, pid_t caller,
                      const int fds[CALL_FDS])
{
	struct stream *stream;
	char payload[4 * NAME_LIMIT];
	size_t length = (size_t)(request.end - request.next), size = strlen(user) + 1;

	if (!port_connected() || stream_count[1] == STREAMS_MAX)
		return port_connected() ? "too many calls at once" : "no host is connected";
	if (!(stream = stream_new(last_guest + 1, 0)))
		return "there is no memory for it";
	last_guest++;
	stream->status = fds[STATUS];
	stream->caller = caller;
	channel_open(stream, 0, fds[FROM_CALLER], false);
	channel_open(stream, 1, fds[TO_CALLER], true);
	memcpy(payload, request.next, length);
	memcpy(payload + length, user, size);
	send_frame(CALL, 0, stream->id, payload, length + size);
	return NULL;
}

/* The service in whose session a process is, or the call of a client, writes its output
 * to the socket that is its stdin. Nobody can say so for another user's. */
void stream_use_stdin(pid_t pid, pid_t sender, uid_t uid)
{
	pid_t session = getsid(pid);

	for (struct stream *stream = streams; stream; stream = stream->next) {
		bool call = stream->pid == 0;
		struct channel *sink = &stream->channels[call], *source = &stream->channels[!call];
		int fd = stream->spare;

		if (stream->ended || stream->terminal || stream->pid == NO_PROCESS ||
		    source->fd < 0 ||
		    (call ? pid != stream->caller || pid != sender
		          : stream->pid != session || (uid != 0 && uid != stream->uid)))
			continue;
		if (fd < 0 && sink->fd >= 0)
			fd = fcntl(sink->fd, F_DUPFD_CLOEXEC, 0);
		if (fd < 0)
			continue;
		stream->spare = -1;
		channel_close(source);
		source->fd = fd;
	}
}

static void stream_free(struct stream *stream);

void stream_reaped(pid_t pid, int status)
{
	for (struct stream *stream = streams; stream; stream = stream->next) {
		if (stream->pid != pid || stream->ended)
			continue;
		if (WIFSIGNALED(status))
			stream_end(stream, KILLED, WTERMSIG(status), "");
		else
			stream_end(stream, EXITED, WEXITSTATUS(status), "");
		/* EXIT waits in streams_sweep() until both outputs are closed: it must be the
		 * last frame of its stream. */
		channel_close(&stream->channels[0]);
		source_drain(&stream->channels[1]);
		source_drain(&stream->channels[2]);
		return;
	}
	for (struct stream **link = &left; *link; link = &(*link)->next) {
		struct stream *stream = *link;

		if (stream->pid != pid)
			continue;
		*link = stream->next;
		stream_free(stream);
		return;
	}
}

/* What runs in the foreground of a terminal has a process group of its own. */
static void stream_signal(const struct stream *stream, int number)
{
	pid_t foreground;

	if (stream->pid <= 0 || stream->ended)
		return;
	/* Not when it has ended: its number is reaped, and may be another process's by now.
	 * The foreground is asked for first: who is killed leaves it. */
	foreground = stream->terminal ? tcgetpgrp(stream->channels[1].fd) : -1;
	kill(-stream->pid, number);
	if (foreground > 0 && foreground != stream->pid)
		kill(-foreground, number);
}

static void stream_free(struct stream *stream)
{
	for (int i = 0; i < CHANNELS; i++)
		channel_close(&stream->channels[i]);
	if (stream->pid == 0) {
		/* The client reads one message: the status as a shell has it, and the text. */
		stream->result.value |= stream->result.kind == KILLED ? 128 : 0;
		tell_client(stream->status, stream->result.value, stream->result.text);
	}
	stream_count[stream->pid == 0]--;
	if (stream->spare >= 0)
		close(stream->spare);
	free(stream->space);
	free(stream);
}

bool streams_sweep(void)
{
	struct stream **link = &streams;

	while (*link) {
		struct stream *stream = *link;

		if (!port_room())
			return false;
		server_check(stream);
		terminal_check(stream);
		if (!stream->ended || stream->channels[1].fd >= 0 || stream->channels[2].fd >= 0) {
			link = &stream->next;
			continue;
		}
		if (stream->pid != 0) {
			/* before the host hears of the end: who waits for it may look then */
			disks_settle();
			tell_end(stream->id, &stream->result);
		}
		/* Freed here alone, and in streams_reset(): elsewhere a stream that has ended is
		 * only marked, as others up the stack, or in `waiting`, may still use it. */
		*link = stream->next;
		stream_free(stream);
	}
	return true;
}

void streams_reset(void)
{
	while (streams) {
		struct stream *stream = streams;

		streams = stream->next;
		if (leaves && stream->pid > 0 && !stream->ended) {
			stream->next = left;
			left = stream;
			continue;
		}
		stream_signal(stream, SIGKILL);
		if (stream->pid == 0 && !stream->ended)
			stream_end(stream, NOT_STARTED, REFUSED, "the host has disconnected");
		stream_free(stream);
	}
	last_host = 0;
	last_guest = first_guest;
	leaves = false;
}

void streams_leave(bool next_time)
{
	leaves = next_time;
}

/* What is waited for. */

static struct channel *waiting[STREAM_FDS];

nfds_t streams_collect(struct pollfd polled[STREAM_FDS])
{
	nfds_t count = 0;

	for (struct stream *stream = streams; stream; stream = stream->next)
		for (int i = 0; i < CHANNELS; i++) {
			struct channel *channel = &stream->channels[i];
			short out = held(channel) ? POLLOUT : 0;

			/* A source without credit is not read, so its writer waits: this is where the
			 * host's slow reader comes to hold up the command. Not even its hang-up is
			 * asked for, which would be there at each turn and never cease. */
			if (channel->fd < 0 || (!channel->sink && channel->credit == 0))
				continue;
			waiting[count] = channel;
			polled[count++] = (struct pollfd){
				.fd = channel->fd, .events = channel->sink ? out : POLLIN};
		}
	return count;
}

void streams_ready(const struct pollfd *polled, nfds_t count)
{
	for (nfds_t i = 0; i < count; i++) {
		if (polled[i].revents == 0)
			continue;
		if (!waiting[i]->sink)
			source_ready(waiting[i]);
		else if (polled[i].revents & (POLLERR | POLLHUP))
			sink_stop(waiting[i]);
		else
			sink_flush(waiting[i]);
	}
}

/* What the host says about a stream; an answer names the rule that was broken. */

static struct stream *find(uint32_t id)
{
	struct stream *stream = streams;

	while (stream && stream->id != id)
		stream = stream->next;
	return stream;
}

static const char *channel_frame(struct channel *channel, const struct frame *frame,
                                 const uint8_t *payload)
{
	uint32_t credit;

	if (channel->sink != (frame->type == DATA || frame->type == END_OF_FILE))
		return "that is not for this channel";
	if (frame->type == DATA)
		return sink_data(channel, payload, frame->length);
	if (frame->type == END_OF_FILE)
		return sink_finish(channel);
	if (frame->type == STOP) {
		channel_close(channel);
		return NULL;
	}
	memcpy(&credit, payload, sizeof credit);
	if (credit > CREDIT_MAX - channel->credit)
		return "too much credit";
	channel->credit += credit;
	return NULL;
}

static void call_ended(struct stream *call, const struct frame *frame,
                       const uint8_t *payload)
{
	call->ended = true;
	memcpy(&call->result, payload, frame->length);
	channel_close(&call->channels[0]);
	if (!call->channels[1].finished)
		sink_finish(&call->channels[1]);
}

const char *stream_frame(const struct frame *frame, const uint8_t *payload)
{
	struct stream *stream = find(frame->stream);
	uint32_t last = frame->stream > first_guest ? last_guest : last_host;

	if (frame->type == SPAWN) {
		if (frame->stream > first_guest || frame->stream <= last_host)
			return "the number is no new one of the host's";
		last_host = frame->stream;
		command_open(frame->stream, (struct strings){(const char *)payload,
		             (const char *)payload + frame->length});
	} else if (!stream) {
		return frame->stream > last ? "the stream was never opened" : NULL;
	} else if (frame->type == EXIT) {
		if (stream->pid != 0 || stream->ended)
			return "it is not the host's to end";
		call_ended(stream, frame, payload);
	} else if (frame->type == SIGNAL) {
		if (stream->pid == 0 || payload[0] > 64)
			return "there is no such signal, or nothing to be signalled";
		stream_signal(stream, payload[0]);
		/* Nothing here can be killed but the connection. */
		if (stream->pid == NO_PROCESS) {
			channel_close(&stream->channels[0]);
			channel_close(&stream->channels[1]);
		}
	} else if (frame->type == RESIZE) {
		uint16_t size[2];

		memcpy(size, payload, sizeof size);
		if (!stream->terminal || !terminal_resize(stream->channels[1].fd, size[0], size[1]))
			return "that is no terminal, or no size of one";
	} else {
		return frame->channel < CHANNELS
		       ? channel_frame(&stream->channels[frame->channel], frame, payload)
		       : "there is no such channel";
	}
	return NULL;
}
