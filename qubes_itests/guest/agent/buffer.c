/* Bytes on their way from one descriptor to another. */
#include "agent.h"

uint8_t *buffer_room(struct buffer *buffer, size_t length)
{
	size_t held = buffer->end - buffer->start;

	/* Moved when it is half empty only, so that no byte is moved often. */
	if (held == 0 ||
	    (buffer->end + length > buffer->size && buffer->start >= buffer->size / 2)) {
		memmove(buffer->bytes, buffer->bytes + buffer->start, held);
		buffer->start = 0;
		buffer->end = held;
	}
	return buffer->end + length <= buffer->size ? buffer->bytes + buffer->end : NULL;
}

bool buffer_write(struct buffer *buffer, int fd, size_t at_once)
{
	ssize_t done = 1;

	while (done > 0 && buffer->start < buffer->end) {
		size_t held = buffer->end - buffer->start;

		done = write(fd, buffer->bytes + buffer->start, held < at_once ? held : at_once);
		buffer->start += done > 0 ? (size_t)done : 0;
	}
	return done >= 0 || errno == EAGAIN || errno == EINTR;
}

const char *next_string(struct strings *strings)
{
	const char *string = strings->next;

	if (string == strings->end)
		return NULL;
	strings->next += strlen(string) + 1;
	return string;
}
