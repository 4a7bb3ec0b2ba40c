/* QREXEC_AGENT_PID: whom a service tells by SIGUSR1 that it has its output on its stdin.
 *
 * Users cannot signal the agent. Each that has run a service has a process that can be
 * signalled and tells the agent by whom; the signal says nothing else. */
#include "agent.h"

#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/un.h>

enum { LISTENERS = 16 };
static struct {
	uid_t uid;
	pid_t pid;
} listeners[LISTENERS];

void tell_agent(const char *socket_path, const char *what, pid_t pid)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char message[64];
	int length = snprintf(message, sizeof message, "%s%c%d", what, '\0', (int)pid);
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	snprintf(address.sun_path, sizeof address.sun_path, "%s", socket_path);
	sendto(fd, message, (size_t)length + 1, MSG_NOSIGNAL, (struct sockaddr *)&address,
	       sizeof address);
	close(fd);
}

static _Noreturn void listen_to(const struct passwd *user, pid_t agent)
{
	siginfo_t info;
	sigset_t set;

	/* Blocked before anybody knows our number: SIGUSR1 that came earlier would kill. It is
	 * waited for, not handled, since its sender's number is all that it says. */
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_SETMASK, &set, NULL);
	/* Nothing of the agent's: above all not the port. */
	syscall(SYS_close_range, 0u, ~0u, 0u);
	if (chdir("/") != 0 ||
	    (geteuid() == 0 && (setgid(user->pw_gid) != 0 || setuid(user->pw_uid) != 0)))
		_exit(1);
	/* After setuid(2), which clears it. And then whether the agent lives is looked at: it
	 * may have died before. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (getppid() == agent)
		if (sigwaitinfo(&set, &info) == SIGUSR1)
			tell_agent(in_root(SOCKET_PATH), USE_STDIN, info.si_pid);
	_exit(0);
}

pid_t listener_of(const struct passwd *user)
{
	pid_t agent = getpid();
	int free = -1;

	for (int i = 0; i < LISTENERS; i++) {
		if (listeners[i].pid > 0 && listeners[i].uid == user->pw_uid)
			return listeners[i].pid;
		if (listeners[i].pid == 0)
			free = i;
	}
	if (free < 0)
		return -1;
	listeners[free].uid = user->pw_uid;
	/* fork(2) and not vfork(2): it goes on in this program, and never executes another. */
	listeners[free].pid = fork();
	if (listeners[free].pid == 0)
		listen_to(user, agent);
	if (listeners[free].pid < 0)
		listeners[free].pid = 0;
	return listeners[free].pid;
}

void listener_reaped(pid_t pid)
{
	for (int i = 0; i < LISTENERS; i++)
		if (listeners[i].pid == pid)
			listeners[i].pid = 0;
}

/* Before another init takes over, who knows nothing of them. */
void listeners_end(void)
{
	for (int i = 0; i < LISTENERS; i++)
		if (listeners[i].pid > 0)
			kill(listeners[i].pid, SIGKILL);
}
