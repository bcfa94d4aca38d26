from testing.runs import Net

from lightning_spike.testing.wrapping import wrap


class Owner:
    def double(self, value):
        """Twice."""
        return 2 * value


def plus(number):
    return lambda call, value: call(value) + number


def test_several_stand_in_and_come_off_in_any_order():
    owner = Owner()
    first, second = wrap(owner, "double", plus(1)), wrap(owner, "double", plus(10))
    assert owner.double(3) == 17
    first()
    assert owner.double(3) == 16
    first()
    second()
    assert owner.double(3) == 6
    assert vars(owner) == {}


def test_other_instances_are_left_alone_and_the_name_stays():
    owner, other = Owner(), Owner()
    wrap(owner, "double", plus(1))
    assert other.double(3) == 6
    assert owner.double.__doc__ == "Twice."


def test_what_lay_on_the_instance_before_lies_there_again():
    owner = Owner()

    def own(value):
        return 5 * value

    owner.double = own
    undo = wrap(owner, "double", plus(1))
    assert owner.double(1) == 6
    undo()
    assert owner.double is own


def test_a_wrapper_that_somebody_else_put_outside_goes_on_working():
    owner = Owner()
    undo = wrap(owner, "double", plus(1))
    inner = owner.double
    owner.double = lambda value: inner(value) * 100
    undo()
    assert owner.double(1) == 200


def test_a_module_takes_it_as_a_method():
    module = Net()
    undo = wrap(module, "training_step", lambda call, *args: (call, args))
    assert module.training_step(1, 2)[1] == (1, 2)
    undo()
    assert "training_step" not in vars(module)
