/* The loop: one process waits for everything, and nothing in it blocks. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

/* While the port takes no more output, only the port is waited for: two sets. */
static int everything = -1, only_port = -1;
static struct watch signals = {.fd = -1};

void watch_events(struct watch *watch, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.ptr = watch};
	int operation = events == 0 ? EPOLL_CTL_DEL
	                : watch->events == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;

	if (events == watch->events)
		return;
	if (epoll_ctl(everything, operation, watch->fd, &event) != 0)
		die("epoll_ctl");
	watch->events = events;
}

void watch_open(struct watch *watch, int fd, uint32_t events,
                void (*ready)(struct watch *, uint32_t))
{
	if (everything < 0 && (everything = epoll_create1(EPOLL_CLOEXEC)) < 0)
		die("epoll_create1");
	*watch = (struct watch){.fd = fd, .ready = ready};
	watch_events(watch, events);
}

void watch_close(struct watch *watch)
{
	if (watch->fd < 0)
		return;
	/* Said in words: another descriptor may keep the open file, and its events. */
	watch_events(watch, 0);
	close(watch->fd);
	watch->fd = -1;
}

static void reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		stream_reaped(pid, status);
}

static void signal_ready(struct watch *watch, uint32_t events)
{
	struct signalfd_siginfo info;

	(void)events;
	while (read(watch->fd, &info, sizeof info) == (ssize_t)sizeof info) {
		if (info.ssi_signo == SIGCHLD)
			reap();
		else /* as busybox poweroff, halt and reboot tell their init */
			power_off(info.ssi_signo == SIGTERM);
	}
}

static void signals_open(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	if (!testing) {
		sigaddset(&set, SIGTERM);
		sigaddset(&set, SIGUSR1);
		sigaddset(&set, SIGUSR2);
	}
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	watch_open(&signals, signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK), EPOLLIN,
	           signal_ready);
}

static void port_watch(int fd)
{
	/* Edges, for a port whose host is away is "ready" all the time. */
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET};

	only_port = epoll_create1(EPOLL_CLOEXEC);
	if (only_port < 0 || epoll_ctl(only_port, EPOLL_CTL_ADD, fd, &event) != 0 ||
	    epoll_ctl(everything, EPOLL_CTL_ADD, fd, &event) != 0)
		die("the port cannot be watched");
	port_open(fd);
}

_Noreturn void run_loop(int port_fd)
{
	struct epoll_event ready[64];
	bool more = true;

	streams_init();
	signals_open();
	port_watch(port_fd);
	for (;;) {
		bool full = !port_room();
		int count = epoll_wait(full ? only_port : everything, ready, 64,
		                       more && !full ? 0 : -1);

		if (count < 0 && errno != EINTR)
			die("epoll_wait");
		for (int i = 0; i < count; i++) {
			struct watch *watch = ready[i].data.ptr;

			/* Nothing can be read before there is room to answer. */
			if (!watch && full && ready[i].events & EPOLLHUP)
				port_disconnected();
			/* Closed by an earlier one of this round, perhaps. */
			if (watch && watch->fd >= 0 && watch->events)
				watch->ready(watch, ready[i].events);
		}
		/* Last, as it opens streams: no stale event may meet a new one. */
		more = port_room() && port_receive();
		port_flush();
		more = more || !port_room();
	}
}
