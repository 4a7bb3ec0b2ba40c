/* Streams: commands and services that the host runs here, calls that go out.
 *
 * A source is what the agent reads for the host, a sink what it writes for it.  A
 * command has a sink (stdin) and two sources; a call has one of each, the same socket. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { GIVE_BACK = WINDOW / 4, CREDIT_MAX = INT32_MAX };
enum kind { FREE, COMMAND, OUTGOING };
enum phase { RUNNING, ENDED };

struct source {
	struct watch watch;
	struct stream *stream;
	uint8_t channel;
	uint32_t credit;
	int last; /* bytes still to be sent when the command has ended */
};

struct sink {
	struct watch watch;
	struct stream *stream;
	uint8_t channel;
	bool finished;           /* the host sent EOF */
	uint32_t credit, taken;  /* the host's; what is still to be given back */
	uint32_t start, length;  /* of what waits in the ring */
	uint8_t *ring;
};

struct stream {
	enum kind kind;
	enum phase phase;
	uint32_t id;
	pid_t pid;
	uint8_t exit_kind, exit_value;
	char text[TEXT_MAX];
	struct sink sink;
	struct source sources[2];
	struct watch control; /* a call's client */
};

static struct stream commands[STREAMS_MAX], calls[STREAMS_MAX];
static uint32_t last_host, last_guest;
static const uint32_t first_guest = 0x80000000u;

void streams_init(void)
{
	for (size_t i = 0; i < STREAMS_MAX; i++) {
		struct stream *both[2] = {&commands[i], &calls[i]};

		for (size_t j = 0; j < 2; j++)
			both[j]->sink.watch.fd = both[j]->control.fd =
				both[j]->sources[0].watch.fd = both[j]->sources[1].watch.fd = -1;
	}
}

/* The writer shall see a closed pipe; to close a socket with data in it is a reset. */
static void close_read_end(struct watch *watch)
{
	char dropped[4096];

	if (watch->fd < 0)
		return;
	shutdown(watch->fd, SHUT_RD);
	while (recv(watch->fd, dropped, sizeof dropped, MSG_DONTWAIT) > 0)
		;
	watch_close(watch);
}

static void close_write_end(struct sink *sink)
{
	if (sink->watch.fd < 0)
		return;
	shutdown(sink->watch.fd, SHUT_WR);
	watch_close(&sink->watch);
	if (sink->ring)
		munmap(sink->ring, WINDOW);
	sink->ring = NULL;
	sink->length = 0;
}

static void release(struct stream *stream)
{
	close_write_end(&stream->sink);
	close_read_end(&stream->sources[0].watch);
	close_read_end(&stream->sources[1].watch);
	watch_close(&stream->control);
	stream->kind = FREE;
	stream->id = 0;
}

/* Tell a call's client how it ended; it reads one message: status and text. */
static void answer_client(struct stream *stream)
{
	char message[1 + TEXT_MAX];
	size_t length = strnlen(stream->text, TEXT_MAX);

	message[0] = (char)stream->exit_value;
	memcpy(message + 1, stream->text, length);
	if (stream->control.fd >= 0)
		send(stream->control.fd, message, 1 + length, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void finish(struct stream *stream)
{
	if (stream->phase != ENDED)
		return;
	if (stream->kind == OUTGOING) {
		if (stream->sink.length)
			return;
		answer_client(stream);
	} else {
		if (stream->sources[0].watch.fd >= 0 || stream->sources[1].watch.fd >= 0)
			return;
		send_exit(stream->id, stream->exit_kind, stream->exit_value, stream->text);
	}
	release(stream);
}

void streams_reset(void)
{
	for (size_t i = 0; i < STREAMS_MAX; i++) {
		if (commands[i].kind != FREE) {
			if (commands[i].phase != ENDED)
				kill(-commands[i].pid, SIGKILL);
			release(&commands[i]);
		}
		if (calls[i].kind != FREE) {
			calls[i].exit_value = REFUSED;
			snprintf(calls[i].text, TEXT_MAX, "the host has disconnected");
			answer_client(&calls[i]);
			release(&calls[i]);
		}
	}
	last_host = 0;
	last_guest = first_guest;
}

/* Sources. */

static void source_end(struct source *source)
{
	close_read_end(&source->watch);
	send_frame(END_OF_FILE, source->channel, source->stream->id, NULL, 0);
}

/* Send one frame's worth; false: nothing more can be sent now. */
static bool source_pump(struct source *source)
{
	bool ended = source->stream->kind == COMMAND && source->stream->phase == ENDED;
	size_t limit = source->credit < PAYLOAD_MAX ? source->credit : PAYLOAD_MAX;
	ssize_t length;

	if (ended && (size_t)source->last < limit)
		limit = (size_t)source->last;
	if (ended && source->last == 0)
		source_end(source);
	if (limit == 0 || !port_room())
		return false;
	length = read(source->watch.fd, port_payload(), limit);
	if (length <= 0) {
		if (length == 0 || ended || (errno != EAGAIN && errno != EINTR))
			source_end(source);
		return false;
	}
	send_frame(DATA, source->channel, source->stream->id, port_payload(),
	           (size_t)length);
	source->credit -= (uint32_t)length;
	source->last -= ended ? (int)length : 0;
	if (ended && source->last == 0)
		source_end(source);
	else if (source->credit == 0) /* not even hang-ups: they never cease */
		watch_events(&source->watch, 0);
	return source->watch.fd >= 0 && source->credit > 0;
}

static void source_ready(struct watch *watch, uint32_t events)
{
	struct source *source = container_of(watch, struct source, watch);

	(void)events;
	source_pump(source);
	finish(source->stream);
}

static void source_open(struct stream *stream, int index, uint8_t channel, int fd)
{
	struct source *source = &stream->sources[index];

	*source = (struct source){
		.stream = stream, .channel = channel, .credit = WINDOW};
	watch_open(&source->watch, fd, EPOLLIN, source_ready);
}

/* Send what the source holds now, for its command has ended, and not wait for others. */
static void source_drain(struct source *source)
{
	if (source->watch.fd < 0)
		return;
	if (ioctl(source->watch.fd, FIONREAD, &source->last) != 0)
		source->last = 0;
	while (source->watch.fd >= 0 && source_pump(source))
		;
}

/* Sinks. */

static void sink_stop(struct sink *sink)
{
	close_write_end(sink);
	if (sink->stream->phase != ENDED)
		send_frame(STOP, sink->channel, sink->stream->id, NULL, 0);
}

static void sink_took(struct sink *sink, size_t length)
{
	sink->taken += (uint32_t)length;
	if (sink->taken < GIVE_BACK || sink->finished || sink->stream->phase == ENDED)
		return;
	send_frame(CREDIT, sink->channel, sink->stream->id, &sink->taken, 4);
	sink->credit += sink->taken;
	sink->taken = 0;
}

/* The ring's content in at most two parts, as writev takes it. */
static int sink_parts(const struct sink *sink, struct iovec parts[2])
{
	size_t first = WINDOW - sink->start;

	if (first > sink->length)
		first = sink->length;
	parts[0] = (struct iovec){sink->ring + sink->start, first};
	parts[1] = (struct iovec){sink->ring, sink->length - first};
	return parts[1].iov_len ? 2 : 1;
}

static void sink_ready(struct watch *watch, uint32_t events)
{
	struct sink *sink = container_of(watch, struct sink, watch);
	struct stream *stream = sink->stream;
	struct iovec parts[2];
	ssize_t length = 0;

	if (sink->length) {
		length = writev(watch->fd, parts, sink_parts(sink, parts));
		if (length > 0) {
			sink->start = (sink->start + (uint32_t)length) % WINDOW;
			sink->length -= (uint32_t)length;
			sink_took(sink, (size_t)length);
		}
	}
	if (length < 0 ? errno != EAGAIN && errno != EINTR
	               : events & (EPOLLERR | EPOLLHUP) && !sink->length)
		sink_stop(sink);
	else if (!sink->length && sink->finished)
		close_write_end(sink);
	else if (!sink->length)
		watch_events(watch, EPOLLERR | EPOLLHUP);
	finish(stream);
}

static void sink_open(struct stream *stream, uint8_t channel, int fd)
{
	struct sink *sink = &stream->sink;

	*sink = (struct sink){.stream = stream, .channel = channel, .credit = WINDOW};
	watch_open(&sink->watch, fd, EPOLLERR | EPOLLHUP, sink_ready);
}

static void sink_keep(struct sink *sink, const uint8_t *bytes, size_t length)
{
	uint32_t end = (sink->start + sink->length) % WINDOW;
	size_t first = length < WINDOW - end ? length : WINDOW - end;

	if (!sink->ring) {
		sink->ring = mmap(NULL, WINDOW, PROT_READ | PROT_WRITE,
		                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (sink->ring == MAP_FAILED)
			die("no memory for a stream");
	}
	memcpy(sink->ring + end, bytes, first);
	memcpy(sink->ring, bytes + first, length - first);
	sink->length += (uint32_t)length;
	watch_events(&sink->watch, EPOLLOUT);
}

static void sink_write(struct sink *sink, const uint8_t *bytes, size_t length)
{
	ssize_t done = 0;

	if (!sink->length) {
		done = write(sink->watch.fd, bytes, length);
		if (done < 0 && errno != EAGAIN && errno != EINTR) {
			sink_stop(sink);
			return;
		}
		done = done < 0 ? 0 : done;
		sink_took(sink, (size_t)done);
	}
	if ((size_t)done < length)
		sink_keep(sink, bytes + done, length - (size_t)done);
}

/* Opening. */

static struct stream *find_free(struct stream *streams)
{
	for (size_t i = 0; i < STREAMS_MAX; i++)
		if (streams[i].kind == FREE)
			return &streams[i];
	return NULL;
}

/* Three stream sockets; ours[i] is the agent's end of theirs[i]. */
static bool stdio_pairs(int ours[3], int theirs[3])
{
	for (int i = 0; i < 3; i++) {
		int pair[2];

		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0 ||
		    fcntl(pair[0], F_SETFL, O_NONBLOCK) != 0) {
			while (i-- > 0) {
				close(ours[i]);
				close(theirs[i]);
			}
			return false;
		}
		ours[i] = pair[0];
		theirs[i] = pair[1];
	}
	return true;
}

static void open_command(uint32_t id, struct strings request)
{
	struct stream *stream = find_free(commands);
	struct failure failure = {0};
	int ours[3], theirs[3];

	if (!stream) {
		send_exit(id, NOT_STARTED, REFUSED, "too many commands at once");
		return;
	}
	if (!stdio_pairs(ours, theirs)) {
		send_exit(id, NOT_STARTED, REFUSED, strerror(errno));
		return;
	}
	stream->pid = spawn(request, theirs, &failure);
	for (int i = 0; i < 3; i++) {
		close(theirs[i]);
		if (stream->pid < 0)
			close(ours[i]);
	}
	if (stream->pid < 0) {
		send_exit(id, NOT_STARTED, failure.value, failure.text);
		return;
	}
	stream->kind = COMMAND;
	stream->phase = RUNNING;
	stream->id = id;
	stream->text[0] = '\0';
	sink_open(stream, 0, ours[0]);
	source_open(stream, 0, 1, ours[1]);
	source_open(stream, 1, 2, ours[2]);
}

struct stream *call_slot(void)
{
	return find_free(calls);
}

void call_start(struct stream *stream, int control, int stdio, struct strings request,
                const char *user)
{
	char payload[4 * NAME_LIMIT];
	int duplicate = fcntl(stdio, F_DUPFD_CLOEXEC, 3);
	const char *target = next_string(&request), *service = next_string(&request);
	int length = snprintf(payload, sizeof payload, "%s%c%s%c%s", target, 0, service, 0,
	                      user);

	if (duplicate < 0 || fcntl(stdio, F_SETFL, O_NONBLOCK) != 0)
		die("a call's stdio");
	stream->kind = OUTGOING;
	stream->phase = RUNNING;
	stream->id = ++last_guest;
	stream->text[0] = '\0';
	stream->control = (struct watch){.fd = control};
	sink_open(stream, 1, stdio);
	source_open(stream, 0, 0, duplicate);
	send_frame(CALL, 0, stream->id, payload, (size_t)length + 1);
}

/* What the host says about a stream; an answer names the rule that was broken. */

static struct stream *find(uint32_t id)
{
	struct stream *streams = id > first_guest ? calls : commands;

	for (size_t i = 0; i < STREAMS_MAX; i++)
		if (streams[i].kind != FREE && streams[i].id == id)
			return &streams[i];
	return NULL;
}

static bool was_opened(uint32_t id)
{
	return id > first_guest ? id <= last_guest : id <= last_host;
}

const char *stream_data(const struct frame *frame, const uint8_t *bytes, size_t length)
{
	struct stream *stream = find(frame->stream);
	struct sink *sink = stream ? &stream->sink : NULL;

	if (!stream)
		return was_opened(frame->stream) ? NULL : "DATA for an unknown stream";
	if (frame->channel != sink->channel)
		return "DATA on a channel that the host does not write";
	if (sink->finished)
		return "DATA after EOF or EXIT";
	if (length > sink->credit)
		return "more DATA than credit";
	sink->credit -= (uint32_t)length;
	if (sink->watch.fd >= 0)
		sink_write(sink, bytes, length);
	return NULL;
}

static const char *sink_frame(struct stream *stream, const struct frame *frame)
{
	struct sink *sink = &stream->sink;

	if (frame->channel != sink->channel || sink->finished || frame->length)
		return "a misplaced EOF";
	sink->finished = true;
	if (!sink->length)
		close_write_end(sink);
	return NULL;
}

static const char *source_frame(struct stream *stream, const struct frame *frame,
                                const uint8_t *payload)
{
	struct source *source = &stream->sources[frame->channel == 2];
	uint32_t credit;

	if (frame->channel != source->channel || !source->stream)
		return "CREDIT or STOP on a channel that the host does not read";
	if (frame->type == STOP) {
		close_read_end(&source->watch);
		return frame->length ? "STOP with a payload" : NULL;
	}
	if (frame->length != 4)
		return "CREDIT of a wrong length";
	memcpy(&credit, payload, 4);
	if (credit > CREDIT_MAX - source->credit)
		return "too much CREDIT";
	source->credit += credit;
	if (source->watch.fd >= 0 && source->credit)
		watch_events(&source->watch, EPOLLIN);
	return NULL;
}

static const char *exit_frame(struct stream *stream, const struct frame *frame,
                              const uint8_t *payload)
{
	size_t length = frame->length;

	if (stream->kind != OUTGOING || length < 2 || length > 2 + TEXT_MAX)
		return "a misplaced EXIT";
	stream->exit_value = payload[0] == KILLED ? (uint8_t)(128 + payload[1]) : payload[1];
	snprintf(stream->text, TEXT_MAX, "%.*s", (int)length - 2,
	         (const char *)payload + 2);
	stream->phase = ENDED;
	stream->sink.finished = true;
	close_read_end(&stream->sources[0].watch);
	return NULL;
}

const char *stream_frame(const struct frame *frame, const uint8_t *payload)
{
	struct strings strings = {(const char *)payload,
	                          (const char *)payload + frame->length};
	struct stream *stream = find(frame->stream);
	const char *error;

	if (frame->type == SPAWN) {
		if (frame->stream <= last_host || frame->stream > first_guest)
			return "SPAWN with a used number";
		if (!strings_valid(&strings))
			return "strings without an end";
		last_host = frame->stream;
		open_command(frame->stream, strings);
		return NULL;
	}
	if (frame->type < END_OF_FILE || frame->type > EXIT)
		return "a frame of unknown type on a stream";
	if (!stream)
		return was_opened(frame->stream) ? NULL : "a frame for an unknown stream";
	if (frame->type == END_OF_FILE)
		error = sink_frame(stream, frame);
	else if (frame->type == STOP || frame->type == CREDIT)
		error = source_frame(stream, frame, payload);
	else if (frame->type == EXIT)
		error = exit_frame(stream, frame, payload);
	else if (stream->kind != COMMAND || frame->length != 1 || payload[0] > 64)
		error = "a misplaced SIGNAL";
	else {
		if (stream->phase == RUNNING)
			kill(-stream->pid, payload[0]);
		error = NULL;
	}
	if (!error)
		finish(stream);
	return error;
}

void stream_reaped(pid_t pid, int status)
{
	for (size_t i = 0; i < STREAMS_MAX; i++) {
		struct stream *stream = &commands[i];

		if (stream->kind != COMMAND || stream->phase != RUNNING || stream->pid != pid)
			continue;
		stream->phase = ENDED;
		stream->exit_kind = WIFSIGNALED(status) ? KILLED : EXITED;
		stream->exit_value = (uint8_t)(WIFSIGNALED(status) ? WTERMSIG(status)
		                                                   : WEXITSTATUS(status));
		close_write_end(&stream->sink);
		source_drain(&stream->sources[0]);
		source_drain(&stream->sources[1]);
		finish(stream);
		return;
	}
}
