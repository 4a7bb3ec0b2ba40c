"""A policy that allows some services."""

ALLOWED = {
    "admin.vm.List",
    "qubes.NotifyUpdates",
    "test.Dom0",
    "test.Echo",
    "test.None",
}


class Request:
    def __init__(self, service, argument, source, target, *, system_info):
        self.service, self.target = service, target


class FilePolicy:
    def evaluate(self, request):
        if request.service not in ALLOWED:
            raise PermissionError("denied by policy")
        self.request = request
        return self

    async def execute(self):
        target = self.request.target
        return f"user=root\nresult=allow\ntarget={target}\nautostart=True"
