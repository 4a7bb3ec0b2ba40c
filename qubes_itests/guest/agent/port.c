/* The port: frames from the host are taken apart here, those to it collected. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { INPUT = 131072, OUTPUT = 262144, WRITE_MAX = HEADER_SIZE + PAYLOAD_MAX };

static struct {
	int fd;
	size_t in_start, in_end, out_start, out_end;
	struct frame data;   /* the DATA that is only partly here, */
	size_t data_left;    /* and what is missing of it */
	bool broken;         /* all input is dropped until the host disconnects */
	uint8_t in[INPUT], out[OUTPUT];
} port;
bool testing, connected;

_Noreturn void die(const char *what)
{
	dprintf(STDERR_FILENO, "agent: %s: %s\n", what, strerror(errno));
	if (testing)
		exit(1);
	power_off(false);
}

const char *next_string(struct strings *strings)
{
	const char *string = strings->next;

	if (string == strings->end)
		return NULL;
	strings->next += strlen(string) + 1;
	return string;
}

bool strings_valid(const struct strings *strings)
{
	return strings->next == strings->end || strings->end[-1] == '\0';
}

void port_open(int fd)
{
	/* A blocking write would spin in the driver until the host has taken it. */
	if (fcntl(fd, F_SETFL, O_NONBLOCK) != 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
		die("the port");
	port.fd = fd;
}

void port_disconnected(void)
{
	if (testing)
		exit(port.broken);
	port.in_start = port.in_end = port.out_start = port.out_end = port.data_left = 0;
	port.broken = connected = false;
	streams_reset();
}

void port_flush(void)
{
	while (port.out_start < port.out_end) {
		size_t length = port.out_end - port.out_start;
		ssize_t done = write(port.fd, port.out + port.out_start,
		                     length < WRITE_MAX ? length : WRITE_MAX);

		if (done <= 0)
			break;
		port.out_start += (size_t)done;
	}
	if (port.out_start == port.out_end)
		port.out_start = port.out_end = 0;
}

bool port_room(void)
{
	if (port.out_end + 2 * WRITE_MAX <= OUTPUT)
		return true;
	port_flush();
	if (port.out_start > OUTPUT / 2) {
		memmove(port.out, port.out + port.out_start, port.out_end - port.out_start);
		port.out_end -= port.out_start;
		port.out_start = 0;
	}
	return port.out_end + 2 * WRITE_MAX <= OUTPUT;
}

uint8_t *port_payload(void)
{
	return port.out + port.out_end + HEADER_SIZE;
}

void send_frame(enum frame_type type, uint8_t channel, uint32_t stream,
                const void *payload, size_t length)
{
	struct frame frame = {(uint8_t)type, channel, (uint16_t)length, stream};

	if (port.out_end + HEADER_SIZE + length > OUTPUT) {
		errno = ENOBUFS;
		die("output");
	}
	memcpy(port.out + port.out_end, &frame, HEADER_SIZE);
	if (length && payload != port_payload())
		memcpy(port_payload(), payload, length);
	port.out_end += HEADER_SIZE + length;
	if (port.out_end - port.out_start >= WRITE_MAX)
		port_flush();
}

void send_exit(uint32_t stream, enum exit_kind kind, int value, const char *text)
{
	char payload[2 + TEXT_MAX] = {(char)kind, (char)value};
	size_t length = strnlen(text, TEXT_MAX);

	memcpy(payload + 2, text, length);
	send_frame(EXIT, 0, stream, payload, 2 + length);
}

void send_text(enum frame_type type, const char *format, ...)
{
	char text[1025];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	if (connected)
		send_frame(type, 0, 0, text, strlen(text));
}

static const char *hello(const struct frame *frame, const uint8_t *payload)
{
	uint16_t version = PROTOCOL_VERSION;
	uint8_t answer[18];

	if (frame->length != sizeof answer)
		return "HELLO of a wrong length";
	streams_reset();
	connected = true;
	memcpy(answer, &version, 2);
	memcpy(answer + 2, payload + 2, 16);
	send_frame(READY, 0, 0, answer, sizeof answer);
	return NULL;
}

static void db_request(const char *path, const char *value)
{
	if (!path || !db_set(path, value))
		send_text(FAILED, "the database takes no such entry, or is full");
	else if (!db_publish())
		send_text(FAILED, "%s: %s", DB_PATH, strerror(errno));
	else
		send_frame(DONE, 0, 0, NULL, 0);
}

static const char *control_frame(const struct frame *frame, const uint8_t *payload)
{
	struct strings strings = {(const char *)payload,
	                          (const char *)payload + frame->length};
	const char *path;

	if (frame->type == HELLO)
		return hello(frame, payload);
	if (frame->type == POWER_OFF) {
		if (frame->length != 1)
			return "POWER_OFF of a wrong length";
		power_off(payload[0] == 1);
	}
	if (!strings_valid(&strings))
		return "strings without an end";
	switch (frame->type) {
	case ENTER:
		enter(strings);
		return NULL;
	case DB_WRITE:
		path = next_string(&strings);
		db_request(strings.next < strings.end ? path : NULL, strings.next);
		return NULL;
	case DB_REMOVE:
		db_request(next_string(&strings), NULL);
		return NULL;
	default:
		return "a frame of unknown type on the control stream";
	}
}

/* Handle the frame at the start of the input; false: not all of it is here. */
static bool take_frame(const char **error)
{
	size_t available = port.in_end - port.in_start;
	const uint8_t *payload = port.in + port.in_start + HEADER_SIZE;
	struct frame frame;

	if (available < HEADER_SIZE)
		return false;
	memcpy(&frame, port.in + port.in_start, HEADER_SIZE);
	if (frame.length > PAYLOAD_MAX)
		*error = "a frame longer than allowed";
	else if (!connected && frame.type != HELLO)
		*error = "a frame before HELLO";
	else if (frame.type == DATA && frame.length > 0) {
		port.data = frame;
		port.data_left = frame.length;
		port.in_start += HEADER_SIZE;
		return true;
	} else if (available - HEADER_SIZE < frame.length)
		return false;
	else if (frame.stream == 0)
		*error = control_frame(&frame, payload);
	else
		*error = stream_frame(&frame, payload);
	port.in_start += HEADER_SIZE + frame.length;
	return true;
}

/* Data is passed on as it comes, not when its frame is complete. */
static bool take_data(const char **error)
{
	size_t available = port.in_end - port.in_start;
	size_t length = available < port.data_left ? available : port.data_left;

	if (length == 0)
		return false;
	*error = stream_data(&port.data, port.in + port.in_start, length);
	port.in_start += length;
	port.data_left -= length;
	return true;
}

/* False: some is left, for lack of room for the answers. */
static bool handle_input(void)
{
	const char *error = NULL;
	bool room = true;

	while (!port.broken && (room = port_room())) {
		if (!(port.data_left ? take_data(&error) : take_frame(&error)))
			break;
		if (!error)
			continue;
		send_text(FAILED, "the host broke the protocol: %s", error);
		port.broken = true;
		connected = false;
		streams_reset();
		port_flush();
	}
	if (port.broken)
		port.in_start = port.in_end;
	memmove(port.in, port.in + port.in_start, port.in_end - port.in_start);
	port.in_end -= port.in_start;
	port.in_start = 0;
	return room;
}

bool port_receive(void)
{
	ssize_t length = 1;
	bool handled, lost;

	/* The driver gives at most a page at a time: collect what there is. */
	while (port.in_end < INPUT && length > 0) {
		length = read(port.fd, port.in + port.in_end, INPUT - port.in_end);
		if (length > 0)
			port.in_end += (size_t)length;
	}
	lost = length == 0 || (length < 0 && errno != EAGAIN && errno != EINTR);
	handled = handle_input();
	if (lost)
		port_disconnected();
	return length > 0 || !handled;
}
