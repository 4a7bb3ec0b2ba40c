/* Terminals: pseudo-terminals on which commands run, for people on the host's side. */
#include "agent.h"

#include <sys/ioctl.h>
#include <termios.h>

bool terminal_resize(int master, unsigned int columns, unsigned int rows)
{
	const struct winsize size = {.ws_col = (uint16_t)columns, .ws_row = (uint16_t)rows};

	if (columns < 1 || columns > UINT16_MAX || rows < 1 || rows > UINT16_MAX)
		return false;
	/* Who runs in the foreground is told by SIGWINCH. One that was hung up has no size. */
	ioctl(master, TIOCSWINSZ, &size);
	return true;
}

int terminal_open(const char *size, int *slave)
{
	/* Not as our own terminal: a leader of a session that has none gets the first that it
	 * opens, and is hung up with it. */
	int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC), no = 0;
	unsigned int columns = 0, rows = 0;
	int length = 0;
	struct termios modes;

	*slave = -1;
	if (master < 0)
		return -1;
	/* By the master, for its name may be another one's in a mount namespace. */
	if (ioctl(master, TIOCSPTLCK, &no) == 0)
		*slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	/* Erasing takes characters, not bytes. */
	if (*slave >= 0 && tcgetattr(*slave, &modes) == 0) {
		modes.c_iflag |= IUTF8;
		tcsetattr(*slave, TCSANOW, &modes);
	}
	/* With its first byte already: programs ask once, when they start. */
	if (sscanf(size, "%5ux%5u%n", &columns, &rows, &length) != 2 || size[length] ||
	    !terminal_resize(master, columns, rows)) {
		close(*slave);
		*slave = -1;
		errno = EINVAL;
	}
	if (*slave >= 0)
		return master;
	close(master);
	return -1;
}

bool terminal_empty(int master)
{
	struct pollfd polled = {.fd = master, .events = POLLIN};

	/* poll(2) waits for what is on its way within the kernel; FIONREAD does not. */
	return poll(&polled, 1, 0) != 1 || !(polled.revents & POLLIN);
}
